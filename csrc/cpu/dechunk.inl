// De-chunk of one image and one block of channels: smoothing, blend, plug-back and residual; and its backward in gather
// form. A block is cut into lanes; a lane's rows lie densely in scratch as float32, zero-padded past D.

constexpr int64_t kLanes = DechunkParams::kBlock / kLane;

int64_t dechunk_scratch(int64_t most_tokens, int64_t W) {
  return (3 * kLanes + 1) * most_tokens * kLane + kRows * W * kLane + 16;
}

// Scratch of one block: rows, cell, smooth (lanes, M), v (M), between (kRows, W), all of kLane floats.
struct Scratch {
  float *rows, *cell, *smoothed, *v, *between;

  Scratch(float* memory, int64_t M) {
    rows = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory) + 63) & ~uintptr_t(63));
    cell = rows + kLanes * M * kLane;
    smoothed = cell + kLanes * M * kLane;
    v = smoothed + kLanes * M * kLane;
    between = v + M * kLane;
  }
};

// A whole lane stays in registers: through memory, narrow stores followed by a wide load would stall.
typedef uint16_t halves __attribute__((vector_size(DCDIT_VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint32_t words __attribute__((vector_size(DCDIT_VECTOR_BYTES)));

inline words widened(const void* x) { return __builtin_convertvector(*static_cast<const halves*>(x), words); }

inline vec load_vec(const f32* x) { return *reinterpret_cast<const loose_vec*>(x); }

inline vec load_vec(const bf16* x) { return (vec)(widened(x) << 16); }

inline vec load_vec(const f16* x) {  // as load(f16) does it
  const words bits = widened(x), magnitude = (bits & 0x7fff) << 13;
  const words special = (words)((bits & 0x7c00) == 0x7c00), finite = (words)((vec)magnitude * 0x1p112f);
  return (vec)((bits & 0x8000) << 16 | (special & (magnitude | 0x7f800000)) | (~special & finite));
}

template <class Number>
inline Quad read_lane(const Number* x, int64_t n) {
  if (n >= kLane) {
    Quad q;
#pragma GCC unroll 4
    for (int k = 0; k < kQuad; ++k) q.v[k] = load_vec(x + k * kWide);
    return q;
  }
  float to[kLane];
  for (int64_t d = 0; d < n; ++d) to[d] = load(x[d]);
  for (int64_t d = n; d < kLane; ++d) to[d] = 0.0f;
  return Quad::read(to);
}

template <class Number>
inline void write_lane(const Quad& q, int64_t n, Number* x) {
  float from[kLane];
  q.write(from);
  if (n >= kLane)
    for (int64_t d = 0; d < kLane; ++d) store(x[d], from[d]);
  else
    for (int64_t d = 0; d < n; ++d) store(x[d], from[d]);
}

inline void write_lane(const Quad& q, int64_t n, f32* x) {
  if (n >= kLane) return q.write(&x->bits);
  float from[kLane];
  q.write(from);
  for (int64_t d = 0; d < n; ++d) x[d].bits = from[d];
}

// The rows that fill the grid, p h + (1 - p) s, into scratch; for the backward (`keep`) s too.
template <class Number>
void fill_rows(const DechunkParams& p, const Window& w, const ImagePlan& plan, int64_t block, const Scratch& at,
               bool keep) {
  const Number* h = static_cast<const Number*>(p.h);
  const int64_t M = plan.M;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const int64_t c0 = block * DechunkParams::kBlock + lane * kLane, n = p.D - c0;
    if (n <= 0) break;
    for (int64_t t = 0; t < M; ++t)
      read_lane(h + (plan.first + t) * p.D + c0, n).times(plan.p[t]).write(at.v + t * kLane);
    float *rows = at.rows + lane * M * kLane, *smoothed = at.smoothed + lane * M * kLane;
    smooth(w, plan, p.H, p.W, at.v, at.between, [&](int64_t i, const Quad& sum) {
      const Quad s = sum.times(1.0f / plan.norm[i]);
      if (keep) s.write(smoothed + i * kLane);
      Quad out = Quad::read(at.v + i * kLane);
      out.add(1.0f - plan.p[i], s);
      out.write(rows + i * kLane);
    });
  }
}

template <class Number>
void plug_back(const DechunkParams& p, const ImagePlan& plan, int64_t b, int64_t block, const Scratch& at) {
  const int64_t L = p.H * p.W, c0 = block * DechunkParams::kBlock;
  const Number* residual = static_cast<const Number*>(p.residual) + b * L * p.D + c0;
  float* out = p.out + b * L * p.D + c0;
  for (int64_t i = 0; i < L; ++i) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t n = p.D - c0 - lane * kLane;
      if (n <= 0) break;
      Quad y = Quad::read(at.rows + (lane * plan.M + plan.near[i]) * kLane);
      y.add(read_lane(residual + i * p.D + lane * kLane, n));
      write_lane(y, n, reinterpret_cast<f32*>(out + i * p.D + lane * kLane));
    }
  }
}

void dechunk_forward(const DechunkParams& p, const Window& w, const ImagePlan& plan, int64_t b, int64_t block,
                     float* scratch) {
  const Scratch at(scratch, plan.M);
  switch (p.h_type) {
    case Type::f32: fill_rows<f32>(p, w, plan, block, at, false); break;
    case Type::bf16: fill_rows<bf16>(p, w, plan, block, at, false); break;
    case Type::f16: fill_rows<f16>(p, w, plan, block, at, false); break;
  }
  switch (p.residual_type) {
    case Type::f32: plug_back<f32>(p, plan, b, block, at); break;
    case Type::bf16: plug_back<bf16>(p, plan, b, block, at); break;
    case Type::f16: plug_back<f16>(p, plan, b, block, at); break;
  }
}

// a_i = sum of g over the places that token i fills, and the gate's sums over channels of g times the row filled in.
inline void collect_cells(const DechunkParams& p, const ImagePlan& plan, int64_t b, int64_t block, const Scratch& at) {
  const int64_t L = p.H * p.W, M = plan.M, c0 = block * DechunkParams::kBlock;
  const f32* grad = reinterpret_cast<const f32*>(p.grad + b * L * p.D + c0);
  float* gate = p.part_gate + (block * p.B + b) * L;
  std::fill(at.cell, at.cell + kLanes * M * kLane, 0.0f);
  for (int64_t i = 0; i < L; ++i) {
    Quad dot = Quad::zero();
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t n = p.D - c0 - lane * kLane;
      if (n <= 0) break;
      const Quad g = read_lane(grad + i * p.D + lane * kLane, n);
      const int64_t row = (lane * M + plan.near[i]) * kLane;
      dot.add(g, Quad::read(at.rows + row));
      Quad a = Quad::read(at.cell + row);
      a.add(g);
      a.write(at.cell + row);
    }
    gate[i] = dot.sum();
  }
}

template <class Number>
void backward_rows(const DechunkParams& p, const Window& w, const ImagePlan& plan, int64_t b, int64_t block,
                   const Scratch& at) {
  const int64_t M = plan.M, D = p.D, c0 = block * DechunkParams::kBlock;
  const Number* h = static_cast<const Number*>(p.h) + plan.first * D + c0;
  Number* dh = static_cast<Number*>(p.dh) + plan.first * D + c0;
  float* weight = p.part_weight + block * p.T + plan.first;
  float* cell = p.part_cell + block * p.T + plan.first;
  const int64_t lanes = std::min(kLanes, (D - c0 + kLane - 1) / kLane);

  fill_rows<Number>(p, w, plan, block, at, true);
  collect_cells(p, plan, b, block, at);

  std::fill(weight, weight + M, 0.0f);
  std::fill(cell, cell + M, 0.0f);
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const int64_t n = D - c0 - lane * kLane;
    const float *a = at.cell + lane * M * kLane, *smoothed = at.smoothed + lane * M * kLane;
    for (int64_t t = 0; t < M; ++t)
      Quad::read(a + t * kLane).times((1.0f - plan.p[t]) / plan.norm[t]).write(at.v + t * kLane);
    smooth(w, plan, p.H, p.W, at.v, at.between, [&](int64_t j, const Quad& u) {
      const int64_t at_D = j * D + lane * kLane;
      const Quad h_j = read_lane(h + at_D, n), s_j = Quad::read(smoothed + j * kLane), a_j = Quad::read(a + j * kLane);
      Quad both = a_j;
      both.add(u);
      write_lane(both.times(plan.p[j]), n, dh + at_D);
      Quad dot = Quad::zero(), dot_s = Quad::zero();
      dot.add(h_j, both);  // h.(a + u)
      dot_s.add(s_j, a_j);
      const float s_a = dot_s.sum();
      weight[j] += dot.sum() - s_a;
      cell[j] += s_a;
    });
  }
}

void dechunk_backward(const DechunkParams& p, const Window& w, const ImagePlan& plan, int64_t b, int64_t block,
                      float* scratch) {
  const Scratch at(scratch, plan.M);
  switch (p.h_type) {
    case Type::f32: return backward_rows<f32>(p, w, plan, b, block, at);
    case Type::bf16: return backward_rows<bf16>(p, w, plan, b, block, at);
    case Type::f16: return backward_rows<f16>(p, w, plan, b, block, at);
  }
}

// Sums over the blocks in their order: the gate of every place, then blend and weights of every token.
void dechunk_sums(const DechunkParams& p, const Window& w, const ImagePlan* plans, int64_t begin, int64_t end) {
  const int64_t L = p.H * p.W, blocks = p.blocks();
  std::vector<float> token, cell, spread;
  for (int64_t b = begin; b < end; ++b) {
    const ImagePlan& plan = plans[b];
    float* __restrict dp = p.dprob + b * L;
    std::fill(dp, dp + L, 0.0f);
    for (int64_t k = 0; k < blocks; ++k) {
      const float* __restrict part = p.part_gate + (k * p.B + b) * L;
      for (int64_t i = 0; i < L; ++i) dp[i] += part[i];
    }
    for (int64_t i = 0; i < L; ++i) dp[i] = p.natural[b * L + i] ? dp[i] : -dp[i];

    const int64_t M = plan.M;
    token.assign(M, 0.0f);
    cell.assign(M, 0.0f);
    spread.resize(M);
    for (int64_t k = 0; k < blocks; ++k)
      for (int64_t t = 0; t < M; ++t) {
        token[t] += p.part_weight[k * p.T + plan.first + t];
        cell[t] += p.part_cell[k * p.T + plan.first + t];
      }
    for (int64_t t = 0; t < M; ++t) cell[t] *= (1.0f - plan.p[t]) / plan.norm[t];
    smooth_scalar(w, plan, p.H, p.W, cell.data(), spread.data());
    for (int64_t t = 0; t < M; ++t) {
      const int64_t i = plan.row[t] * p.W + plan.col[t];
      const float prob = p.prob[b * L + i];
      const bool inside = prob >= kClamp && prob <= 1.0f - kClamp;
      if (inside) dp[i] += token[t] - spread[t];
    }
    dp[0] = dp[L - 1] = 0.0f;  // forced: no gradient to their logits
  }
}
