// SPDX-License-Identifier: Apache-2.0
#include "csrc/core/notices.h"

#include <gtest/gtest.h>

#include <optional>
#include <string>
#include <thread>

namespace jax_ep {
namespace {

// The process's are stopped once, so all is one test.
TEST(Notices, AreReadInOrderThenCountedThenStopped) {
  Notices& notices = Notices::shared();
  notices.post(NoticeLevel::kError, "first");
  notices.post(NoticeLevel::kInfo, "second");
  std::optional<Notice> notice = notices.next();
  ASSERT_TRUE(notice.has_value());
  EXPECT_EQ(notice->level, NoticeLevel::kError);
  EXPECT_EQ(notice->text, "first");
  EXPECT_EQ(notices.next()->text, "second");

  // next() waits for one.
  std::thread poster([&notices] { notices.post(NoticeLevel::kWarning, "third"); });
  EXPECT_EQ(notices.next()->text, "third");
  poster.join();

  // Nobody reads: the newest are counted.
  for (int i = 0; i < 1200; ++i) notices.post(NoticeLevel::kInfo, std::to_string(i));
  for (int i = 0; i < 1000; ++i) EXPECT_EQ(notices.next()->text, std::to_string(i));
  notice = notices.next();
  EXPECT_EQ(notice->level, NoticeLevel::kWarning);
  EXPECT_EQ(notice->text, "200 messages were lost: they came faster than they were read");

  // What is there when it is stopped is still read.
  notices.post(NoticeLevel::kError, "last");
  notices.stop();
  EXPECT_EQ(notices.next()->text, "last");
  EXPECT_FALSE(notices.next().has_value());
}

}  // namespace
}  // namespace jax_ep
