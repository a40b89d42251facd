// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/row_arithmetic.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "csrc/core/float_formats.h"
#include "csrc/testing/reference.h"

namespace jax_ep {
namespace {

// Every kernel of every instruction set against the definitions, for every dtype.
template <typename F>
class RowArithmeticOf : public testing::Test {
 protected:
  using Storage = typename F::Storage;

  static std::vector<Storage> encode(const std::vector<float>& values) {
    std::vector<Storage> row;
    for (const float value : values) row.push_back(F::from_float(value));
    return row;
  }

  std::vector<float> random_row(int64_t hidden, int max_exponent) {
    std::normal_distribution<float> normal;
    std::uniform_int_distribution<int> exponent(-max_exponent, max_exponent);
    std::vector<float> values;
    for (int64_t i = 0; i < hidden; ++i) {
      values.push_back(F::to_float(F::from_float(std::ldexp(normal(random_), exponent(random_)))));
    }
    return values;
  }

  // Bits must agree, except that any NaN is as good as another.
  static void expect_same(const std::vector<Storage>& got, const std::vector<float>& expected) {
    ASSERT_EQ(got.size(), expected.size());
    for (size_t i = 0; i < got.size(); ++i) {
      const float value = F::to_float(got[i]);
      if (std::isnan(expected[i])) {
        ASSERT_TRUE(std::isnan(value)) << i;
      } else {
        ASSERT_EQ(value, expected[i]) << "channel " << i;
        ASSERT_EQ(std::signbit(value), std::signbit(expected[i])) << "channel " << i;
      }
    }
  }

  template <typename Body>
  static void for_each_isa(const Body& body) {
    for (const Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
      if (!is_supported(isa)) continue;
      SCOPED_TRACE(std::string(name(isa)));
      body(row_arithmetic(F::kDType, isa));
    }
  }

  std::mt19937 random_{3};
};

using Formats = testing::Types<Float32, BFloat16, Float16>;
TYPED_TEST_SUITE(RowArithmeticOf, Formats);

TYPED_TEST(RowArithmeticOf, SumTermsRoundsAsDefined) {
  const reference::Format format = reference::format_of(TypeParam::kDType);
  // Ends of vector loops and of blocks, and one more.
  for (const int64_t hidden : {0, 1, 3, 15, 16, 17, 63, 64, 65, 1000, 1023, 1024, 1025, 2500}) {
    for (const std::vector<int>& terms_per_rank :
         {std::vector<int>{}, {1}, {2}, {1, 1}, {3, 1, 2}, {1, 4, 1, 1}}) {
      std::vector<std::vector<typename TypeParam::Storage>> rows;
      std::vector<float> expected(static_cast<size_t>(hidden));
      std::vector<std::pair<float, bool>> weights;
      for (const int num_terms : terms_per_rank) {
        std::vector<float> partial(static_cast<size_t>(hidden));
        for (int term = 0; term < num_terms; ++term) {
          const std::vector<float> row = this->random_row(hidden, 12);
          const float weight = std::normal_distribution<float>()(this->random_);
          for (size_t i = 0; i < row.size(); ++i) {
            partial[i] = reference::fused_multiply_add(weight, row[i], partial[i]);
          }
          rows.push_back(this->encode(row));
          weights.emplace_back(weight, term + 1 == num_terms);
        }
        for (size_t i = 0; i < partial.size(); ++i) {
          expected[i] += static_cast<float>(reference::round_to(format, partial[i]));
        }
      }
      for (float& value : expected) value = static_cast<float>(reference::round_to(format, value));
      std::vector<Term> terms;
      for (size_t i = 0; i < rows.size(); ++i) {
        terms.push_back({rows[i].data(), weights[i].first, weights[i].second});
      }
      this->for_each_isa([&](const RowArithmetic& kernels) {
        std::vector<typename TypeParam::Storage> out(static_cast<size_t>(hidden), 7);
        // The next token's rows are only fetched, so any will do.
        kernels.sum_terms(terms, terms, hidden, out.data());
        this->expect_same(out, expected);
      });
    }
  }
}

TYPED_TEST(RowArithmeticOf, SumOfNegativeZerosIsPositiveZero) {
  const auto row = this->encode(std::vector<float>(20, -0.0F));
  const std::vector<Term> terms = {{row.data(), 1.0F, true}};
  this->for_each_isa([&](const RowArithmetic& kernels) {
    std::vector<typename TypeParam::Storage> out(20, 7);
    kernels.sum_terms(terms, {}, 20, out.data());
    this->expect_same(out, std::vector<float>(20, 0.0F));
  });
}

TYPED_TEST(RowArithmeticOf, SumTermsKeepsNansAndInfinities) {
  const std::vector<float> values = {NAN, INFINITY, -INFINITY, INFINITY, 0.0F};
  const std::vector<float> others = {1.0F, 1.0F, 1.0F, -INFINITY, NAN};
  const auto row = this->encode(values);
  const auto other = this->encode(others);
  const std::vector<Term> terms = {{row.data(), 1.0F, true}, {other.data(), 1.0F, true}};
  this->for_each_isa([&](const RowArithmetic& kernels) {
    std::vector<typename TypeParam::Storage> out(5);
    kernels.sum_terms(terms, {}, 5, out.data());
    this->expect_same(out, {NAN, INFINITY, -INFINITY, NAN, NAN});
  });
}

TYPED_TEST(RowArithmeticOf, ScaleAndDotAsDefined) {
  for (const int64_t hidden : {0, 1, 3, 17, 255, 256, 257, 1000, 1024, 1025, 2500}) {
    const std::vector<float> row = this->random_row(hidden, 5);
    const std::vector<float> other = this->random_row(hidden, 5);
    const float weight = std::normal_distribution<float>()(this->random_);
    const std::vector<float> scaled =
        reference::scale_rows(row, {weight}, hidden, TypeParam::kDType);
    const float dot = reference::row_dots(row, other, {0}, hidden)[0];
    const auto x = this->encode(row);
    const auto y = this->encode(other);
    this->for_each_isa([&](const RowArithmetic& kernels) {
      std::vector<typename TypeParam::Storage> out(x.size(), 7);
      kernels.scale(x.data(), weight, hidden, out.data());
      this->expect_same(out, scaled);
      EXPECT_EQ(kernels.dot(x.data(), y.data(), hidden), dot) << hidden;
    });
  }
}

TYPED_TEST(RowArithmeticOf, ProductsKeepNansAndInfinities) {
  const std::vector<float> values = {NAN, INFINITY, -INFINITY, 0.0F, -0.0F};
  const auto x = this->encode(values);
  const auto ones = this->encode(std::vector<float>(5, 1.0F));
  this->for_each_isa([&](const RowArithmetic& kernels) {
    std::vector<typename TypeParam::Storage> out(5);
    kernels.scale(x.data(), 0.0F, 5, out.data());
    this->expect_same(out, {NAN, NAN, NAN, 0.0F, -0.0F});
    EXPECT_TRUE(std::isnan(kernels.dot(x.data(), ones.data(), 2)));
    EXPECT_EQ(kernels.dot(x.data() + 1, ones.data(), 1), INFINITY);
    EXPECT_FALSE(std::signbit(kernels.dot(x.data() + 4, ones.data(), 1)));
  });
}

TYPED_TEST(RowArithmeticOf, RoundToFp8AsDefined) {
  for (const int64_t hidden : {1, 2, 100, 127, 128, 129, 255, 256, 700}) {
    for (const int max_exponent : {0, 6, 13}) {
      const std::vector<float> row = this->random_row(hidden, max_exponent);
      const std::vector<float> expected = reference::fp8_wire(row, TypeParam::kDType);
      const auto x = this->encode(row);
      this->for_each_isa([&](const RowArithmetic& kernels) {
        std::vector<typename TypeParam::Storage> out(x.size(), 7);
        kernels.round_to_fp8(x.data(), hidden, out.data());
        this->expect_same(out, expected);
      });
    }
  }
}

// In two steps, whose arrays end where the row does: the address sanitizer watches.
TYPED_TEST(RowArithmeticOf, QuantizeAndRestoreAsDefined) {
  for (const int64_t hidden : {0, 1, 2, 100, 127, 128, 129, 255, 256, 700}) {
    for (const int max_exponent : {0, 6, 13}) {
      const std::vector<float> row = this->random_row(hidden, max_exponent);
      const reference::QuantizedRow expected = reference::fp8_quantize(row);
      const std::vector<float> restored = reference::fp8_restore(expected, TypeParam::kDType);
      const auto x = this->encode(row);
      this->for_each_isa([&](const RowArithmetic& kernels) {
        reference::QuantizedRow got{std::vector<uint8_t>(x.size(), 7),
                                    std::vector<float>(expected.scales.size(), 7)};
        kernels.quantize(x.data(), hidden, got.values.data(), got.scales.data());
        EXPECT_EQ(got.values, expected.values);
        EXPECT_EQ(got.scales, expected.scales);
        std::vector<typename TypeParam::Storage> out(x.size(), 7);
        kernels.restore(expected.values.data(), expected.scales.data(), hidden, out.data());
        this->expect_same(out, restored);
      });
    }
  }
}

// Rows that a user quantized: every code, and scales that `quantize` would not give.
TYPED_TEST(RowArithmeticOf, RestoreTakesEveryCodeAndScale) {
  for (const float scale : {0.0F, -1.5F, 0.3F, 1e-30F, 1e30F, INFINITY, NAN}) {
    reference::QuantizedRow row{{}, {scale, scale}};
    for (int code = 0; code < 256; ++code) row.values.push_back(static_cast<uint8_t>(code));
    const std::vector<float> expected = reference::fp8_restore(row, TypeParam::kDType);
    this->for_each_isa([&](const RowArithmetic& kernels) {
      std::vector<typename TypeParam::Storage> out(256, 7);
      kernels.restore(row.values.data(), row.scales.data(), 256, out.data());
      this->expect_same(out, expected);
    });
  }
}

// One special value decides over its block of 128, and over no other.
TYPED_TEST(RowArithmeticOf, RoundToFp8OfSpecialValues) {
  for (const float special : {NAN, INFINITY, -INFINITY, 0.0F, -0.0F, 1e-7F, 65504.0F}) {
    std::vector<float> row(300, special == 1e-7F ? 0.0F : 0.5F);
    row[130] = TypeParam::to_float(TypeParam::from_float(special));
    const std::vector<float> expected = reference::fp8_wire(row, TypeParam::kDType);
    EXPECT_EQ(std::isnan(expected[131]), std::isnan(special) || std::isinf(special));
    EXPECT_FALSE(std::isnan(expected[127]));
    EXPECT_FALSE(std::isnan(expected[256]));
    const auto x = this->encode(row);
    this->for_each_isa([&](const RowArithmetic& kernels) {
      std::vector<typename TypeParam::Storage> out(x.size(), 7);
      kernels.round_to_fp8(x.data(), 300, out.data());
      this->expect_same(out, expected);
    });
  }
}

TEST(RowArithmetic, ThisProcessorHasABaseline) {
  EXPECT_TRUE(is_supported(Isa::kBaseline));
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    EXPECT_NE(row_arithmetic(dtype).sum_terms, nullptr);
    EXPECT_NE(row_arithmetic(dtype).scale, nullptr);
    EXPECT_NE(row_arithmetic(dtype).dot, nullptr);
    EXPECT_NE(row_arithmetic(dtype).quantize, nullptr);
    EXPECT_NE(row_arithmetic(dtype).restore, nullptr);
    EXPECT_NE(row_arithmetic(dtype).round_to_fp8, nullptr);
  }
}

}  // namespace
}  // namespace jax_ep
