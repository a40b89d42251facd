// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/row_writer.h"

#include <algorithm>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace jax_ep {
namespace {

#ifdef __SSE2__

constexpr int64_t kLine = 64;

// Bytes up to the next line, all of `bytes` if there is none inside. Lines that are written in
// part are written through the caches: streamed, each part would go to memory by itself.
int64_t bytes_to_line(const std::byte* address, int64_t bytes) {
  const auto misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(address) % kLine);
  return std::min(bytes, (kLine - misaligned) % kLine);
}

void stream_line(std::byte* to, __m128i a, __m128i b, __m128i c, __m128i d) {
  auto* const line = reinterpret_cast<__m128i*>(to);
  _mm_stream_si128(line, a);
  _mm_stream_si128(line + 1, b);
  _mm_stream_si128(line + 2, c);
  _mm_stream_si128(line + 3, d);
}

void stream_copy(std::byte* to, const std::byte* from, int64_t bytes) {
  const int64_t head = bytes_to_line(to, bytes);
  std::memcpy(to, from, static_cast<size_t>(head));
  int64_t at = head;
  for (; at + kLine <= bytes; at += kLine) {
    const auto* const line = reinterpret_cast<const __m128i*>(from + at);
    stream_line(to + at,
                _mm_loadu_si128(line),
                _mm_loadu_si128(line + 1),
                _mm_loadu_si128(line + 2),
                _mm_loadu_si128(line + 3));
  }
  std::memcpy(to + at, from + at, static_cast<size_t>(bytes - at));
}

void stream_zeros(std::byte* to, int64_t bytes) {
  const int64_t head = bytes_to_line(to, bytes);
  std::memset(to, 0, static_cast<size_t>(head));
  const __m128i zero = _mm_setzero_si128();
  int64_t at = head;
  for (; at + kLine <= bytes; at += kLine) stream_line(to + at, zero, zero, zero, zero);
  std::memset(to + at, 0, static_cast<size_t>(bytes - at));
}

void fence() { _mm_sfence(); }

#else

// No portable way to stream: an ordinary copy is right as well.
void stream_copy(std::byte* to, const std::byte* from, int64_t bytes) {
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

void stream_zeros(std::byte* to, int64_t bytes) { std::memset(to, 0, static_cast<size_t>(bytes)); }

void fence() {}

#endif

}  // namespace

RowWriter::~RowWriter() {
  if (streaming_) fence();
}

void RowWriter::copy(std::byte* to, const std::byte* from, int64_t bytes) const {
  if (bytes == 0) return;  // the pointers may be null then
  if (streaming_) {
    stream_copy(to, from, bytes);
  } else {
    std::memcpy(to, from, static_cast<size_t>(bytes));
  }
}

void RowWriter::clear(std::byte* to, int64_t bytes) const {
  if (bytes == 0) return;
  if (streaming_) {
    stream_zeros(to, bytes);
  } else {
    std::memset(to, 0, static_cast<size_t>(bytes));
  }
}

}  // namespace jax_ep
