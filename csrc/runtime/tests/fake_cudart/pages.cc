// SPDX-License-Identifier: Apache-2.0
#include "csrc/runtime/tests/fake_cudart/pages.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <random>
#include <string>
#include <utility>

namespace jax_ep::fake_cudart {
namespace {

constexpr size_t kPage = 4096;
constexpr int kPoison = 0xCD;
// Bytes of the file that are locked.
constexpr off_t kMakerLock = 0;
constexpr off_t kMapperLock = 1;

// Of what CUDA allocates, at least.
constexpr size_t kAlignment = 256;

size_t align_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }
size_t whole_pages(size_t bytes) { return align_up(bytes, kPage); }
// Where the bytes begin in their pages, whose end is theirs.
size_t offset_in_pages(size_t bytes) { return whole_pages(bytes) - align_up(bytes, kAlignment); }

uint64_t random_number() {
  std::random_device random;
  return uint64_t{random()} << 32 | random();
}

struct flock lock_on(off_t byte, short type) {
  struct flock lock{};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  lock.l_start = byte;
  lock.l_len = 1;
  return lock;
}

// Of the open file, not of the process: one that shares neither with other threads nor by mistake.
bool hold(int descriptor, off_t byte) {
  struct flock lock = lock_on(byte, F_RDLCK);
  return fcntl(descriptor, F_OFD_SETLK, &lock) == 0;
}

bool others_hold(int descriptor, off_t byte) {
  struct flock lock = lock_on(byte, F_WRLCK);
  return fcntl(descriptor, F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}

// Bytes of a file, after its first page, between two pages that nobody may touch.
std::byte* map_guarded(int descriptor, size_t bytes) {
  const size_t inside = whole_pages(bytes);
  void* const reserved =
      mmap(nullptr, inside + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (reserved == MAP_FAILED) return nullptr;
  std::byte* const pages = static_cast<std::byte*>(reserved) + kPage;
  void* const mapped =
      mmap(pages, inside, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, descriptor, kPage);
  return mapped == MAP_FAILED ? nullptr : pages + offset_in_pages(bytes);
}

// The addresses stay taken, so that whoever still uses them is noticed.
void unmap_guarded(std::byte* data, size_t bytes) {
  if (data == nullptr) return;
  static_cast<void>(mmap(data - offset_in_pages(bytes),
                         whole_pages(bytes),
                         PROT_NONE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE,
                         -1,
                         0));
}

}  // namespace

// The file's first page.
struct Pages::Control {
  uint64_t serial;
  std::atomic<uint32_t> freed;
};

bool Pages::map() {
  void* const control = mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor_, 0);
  if (control == MAP_FAILED) return false;
  control_ = static_cast<Control*>(control);
  data_ = map_guarded(descriptor_, bytes_);
  return data_ != nullptr;
}

void Pages::unmap() {
  unmap_guarded(std::exchange(data_, nullptr), bytes_);
  unmap_guarded(std::exchange(alias_, nullptr), bytes_);
}

Pages::~Pages() {
  unmap();
  if (control_ != nullptr) munmap(control_, kPage);
  if (descriptor_ >= 0) close(descriptor_);
}

std::unique_ptr<Pages> Pages::make(size_t bytes, Alias alias) {
  std::unique_ptr<Pages> made(new Pages(bytes));
  made->descriptor_ = memfd_create("jax_ep_fake_cudart", MFD_CLOEXEC);
  if (made->descriptor_ < 0) return nullptr;
  const auto file_bytes = static_cast<off_t>(kPage + whole_pages(bytes));
  if (ftruncate(made->descriptor_, file_bytes) != 0 || !hold(made->descriptor_, kMakerLock) ||
      !made->map()) {
    return nullptr;
  }
  made->control_->serial = random_number();
  std::memset(made->data_, kPoison, bytes);
  if (alias == Alias::kSecond) {
    made->alias_ = map_guarded(made->descriptor_, bytes);
    if (made->alias_ == nullptr) return nullptr;
  }
  return made;
}

std::unique_ptr<Pages> Pages::open(const Ticket& ticket, OpenError& error) {
  error = OpenError::kOwnerGone;
  std::unique_ptr<Pages> opened(new Pages(ticket.bytes));
  const std::string path =
      "/proc/" + std::to_string(ticket.pid) + "/fd/" + std::to_string(ticket.descriptor);
  opened->descriptor_ = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  struct stat about{};
  if (opened->descriptor_ < 0 || fstat(opened->descriptor_, &about) != 0) return nullptr;
  error = OpenError::kFreed;
  if (about.st_size != static_cast<off_t>(kPage + whole_pages(ticket.bytes)) ||
      !hold(opened->descriptor_, kMapperLock) || !opened->map() ||
      opened->control_->serial != ticket.serial || opened->control_->freed != 0) {
    return nullptr;
  }
  error = OpenError::kNone;
  return opened;
}

bool Pages::contains(const void* address) const {
  const auto* const byte = static_cast<const std::byte*>(address);
  return data_ != nullptr && byte >= data_ && byte < data_ + bytes_;
}

Ticket Pages::ticket() const {
  return {.pid = getpid(),
          .descriptor = descriptor_,
          .reserved = 0,
          .serial = control_->serial,
          .bytes = bytes_};
}

bool Pages::free() {
  control_->freed = 1;
  const bool mapped = others_hold(descriptor_, kMapperLock);
  unmap();
  // The descriptor stays: who asks for the pages is told that they are freed. Their memory does
  // not, unless somebody would lose it.
  [[maybe_unused]] const int shortened = mapped ? 0 : ftruncate(descriptor_, kPage);
  return mapped;
}

bool Pages::abandoned() const {
  return control_->freed != 0 || !others_hold(descriptor_, kMakerLock);
}

}  // namespace jax_ep::fake_cudart
