// Gaussian smoothing of token rows, kLane channels at a time: out_i = sum_j K_ij v_j over the tokens of one image.
// Both ways visit tokens in a fixed order, so the bits do not depend on threads.

typedef float vec __attribute__((vector_size(DCDIT_VECTOR_BYTES)));
typedef float loose_vec __attribute__((vector_size(DCDIT_VECTOR_BYTES), aligned(4), may_alias));

constexpr int64_t kWide = DCDIT_VECTOR_BYTES / 4;  // floats in a vector
constexpr int kQuad = 4;                           // vectors worked on together
constexpr int64_t kLane = kQuad * kWide;           // channels worked on together
static_assert(DechunkParams::kBlock % kLane == 0, "a block is whole lanes");

struct Quad {
  vec v[kQuad];

  static Quad zero() {
    Quad q;
#pragma GCC unroll 4
    for (int k = 0; k < kQuad; ++k) q.v[k] = vec{};
    return q;
  }
  static Quad read(const float* x) {
    Quad q;
#pragma GCC unroll 4
    for (int k = 0; k < kQuad; ++k) q.v[k] = *reinterpret_cast<const loose_vec*>(x + k * kWide);
    return q;
  }
  void write(float* x) const {
#pragma GCC unroll 4
    for (int k = 0; k < kQuad; ++k) *reinterpret_cast<loose_vec*>(x + k * kWide) = v[k];
  }
  void add(float weight, const Quad& x) {
#pragma GCC unroll 4
    for (int k = 0; k < kQuad; ++k) v[k] += weight * x.v[k];
  }
  void add(const Quad& x, const Quad& y) {  // += x * y
#pragma GCC unroll 4
    for (int k = 0; k < kQuad; ++k) v[k] += x.v[k] * y.v[k];
  }
  void add(const Quad& x) {
#pragma GCC unroll 4
    for (int k = 0; k < kQuad; ++k) v[k] += x.v[k];
  }
  Quad times(float weight) const {
    Quad q;
#pragma GCC unroll 4
    for (int k = 0; k < kQuad; ++k) q.v[k] = v[k] * weight;
    return q;
  }
  float sum() const {
    const vec s = (v[0] + v[1]) + (v[2] + v[3]);
    float lane[kWide];
    std::memcpy(lane, &s, sizeof s);
    for (int64_t half = kWide / 2; half > 0; half /= 2)
      for (int64_t k = 0; k < half; ++k) lane[k] += lane[k + half];
    return lane[0];
  }
};

// Neighbours listed in the plan: best where tokens are few.
template <class Emit>
inline void smooth_direct(const ImagePlan& plan, const float* v, Emit emit) {
  for (int64_t i = 0; i < plan.M; ++i) {
    Quad even = Quad::zero(), odd = Quad::zero();  // two chains hide the latency of the additions
    int64_t k = plan.list_start[i];
    const int64_t end = plan.list_start[i + 1];
    for (; k + 1 < end; k += 2) {
      even.add(plan.list_weight[k], Quad::read(v + plan.list_token[k] * kLane));
      odd.add(plan.list_weight[k + 1], Quad::read(v + plan.list_token[k + 1] * kLane));
    }
    if (k < end) even.add(plan.list_weight[k], Quad::read(v + plan.list_token[k] * kLane));
    even.add(odd);
    emit(i, even);
  }
}

// Down the columns over the tokens that are there, then along the row: kRows rows of the grid at a time, so that the
// sums in between stay in the first-level cache.
template <class Emit>
inline void smooth_separable(const Window& w, const ImagePlan& plan, int64_t H, int64_t W, const float* v, float* between,
                             Emit emit) {
  const int64_t R = w.radius;
  const float* weight = w.centre();
  std::vector<int32_t> low(plan.column_start.begin(), plan.column_start.end() - 1), high = low;
  for (int64_t r0 = 0; r0 < H; r0 += kRows) {
    const int64_t from = plan.rank[r0 * W], to = plan.rank[std::min(H, r0 + kRows) * W];
    for (int64_t c = 0; c < W; ++c) {
      const int64_t end = plan.column_start[c + 1];
      int32_t &lo = low[c], &hi = high[c];
      while (lo < end && plan.row[plan.column_token[lo]] < r0 - R) ++lo;
      while (hi < end && plan.row[plan.column_token[hi]] <= r0 + kRows - 1 + R) ++hi;
      if (from == to) continue;
      Quad sum[kRows];
#pragma GCC unroll 4
      for (int q = 0; q < kRows; ++q) sum[q] = Quad::zero();
      for (int32_t k = lo; k < hi; ++k) {
        const int32_t t = plan.column_token[k];
        const Quad x = Quad::read(v + t * kLane);
        const float* at = weight + (plan.row[t] - r0);
#pragma GCC unroll 4
        for (int q = 0; q < kRows; ++q) sum[q].add(at[-q], x);
      }
#pragma GCC unroll 4
      for (int q = 0; q < kRows; ++q) sum[q].write(between + (q * W + c) * kLane);
    }
    for (int64_t i = from; i < to; ++i) {
      const float* line = between + (plan.row[i] - r0) * W * kLane;
      const int64_t c = plan.col[i], left = std::max<int64_t>(0, c - R), right = std::min(W, c + R + 1);
      Quad even = Quad::zero(), odd = Quad::zero();
      int64_t k = left;
      for (; k + 1 < right; k += 2) {
        even.add(weight[k - c], Quad::read(line + k * kLane));
        odd.add(weight[k + 1 - c], Quad::read(line + (k + 1) * kLane));
      }
      if (k < right) even.add(weight[k - c], Quad::read(line + k * kLane));
      even.add(odd);
      emit(i, even);
    }
  }
}

template <class Emit>
inline void smooth(const Window& w, const ImagePlan& plan, int64_t H, int64_t W, const float* v, float* between, Emit emit) {
  if (plan.direct)
    smooth_direct(plan, v, emit);
  else
    smooth_separable(w, plan, H, W, v, between, emit);
}
