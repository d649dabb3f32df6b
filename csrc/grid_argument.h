// The checks of the rule and the grid that ops take. Nothing here knows a device, as in stable_tensor.h.
#pragma once
#include "quant_math.h"
#include "stable_tensor.h"

namespace quantops {

inline void check_rule(int64_t rule) {
  QUANTOPS_CHECK(rule >= 0 && rule < kRules, "rule: expected 0..", kRules - 1, ", got ", rule);
}

inline GridKind check_grid(int64_t grid, bool is_signed = true, int64_t rule = kRoundClamp) {
  QUANTOPS_CHECK(grid >= kDyadic && grid <= kSign, "grid: expected 0..2, got ", grid);
  QUANTOPS_CHECK(grid != kSign || is_signed, "grid: expected 'dyadic' or 'full' for unsigned values, got 'sign'");
  QUANTOPS_CHECK(grid != kSign || rule == kRoundClamp, "rule: expected 'round_clamp' on the sign grid, got ", rule);
  return static_cast<GridKind>(grid);
}

}  // namespace quantops
