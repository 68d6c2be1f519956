// What de-chunking needs to know of one image before it touches a channel: where its tokens are, which of them fills
// each place, and how its smoothing is best summed.
#pragma once
#include <cstdint>
#include <vector>

namespace dcdit {

// The Gaussian along one axis, cut off at `radius`: weight(k) for |k| <= radius, zeros for `kPad` steps beyond.
struct Window {
  static constexpr int kPad = 8;
  int64_t radius = 0;
  std::vector<float> table;  // 2 * (radius + kPad) + 1 entries, the middle one is distance 0

  float operator()(int64_t k) const { return centre()[k]; }
  const float* centre() const { return table.data() + radius + kPad; }
};

struct ImagePlan {
  int64_t first = 0, M = 0;       // its packed rows are first .. first + M
  std::vector<int32_t> row, col;  // (M,) place of each token on the grid
  std::vector<int32_t> rank;      // (L + 1,) tokens before each place
  std::vector<int32_t> near;      // (L,) token that fills each place
  std::vector<int32_t> column_start, column_token;  // (W + 1,), (M,): tokens of each column, by row
  std::vector<float> p, norm;     // (M,) clamped probability; sum of weights + 1e-8
  bool direct = false;            // sum over listed neighbours, not separably
  std::vector<int32_t> list_start, list_token;  // direct: the neighbours of each token
  std::vector<float> list_weight;
};

}  // namespace dcdit
