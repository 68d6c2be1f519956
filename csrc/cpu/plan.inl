// Plans of images: places, nearest tokens, weights' sums, and the choice between the two ways of smoothing.

constexpr float kClamp = 1e-4f, kEps = 1e-8f;
constexpr int64_t kRows = 2;  // grid rows that separable smoothing works on together; at most Window::kPad

// One number per token, smoothed over the grid: out_i = sum_j K_ij x_j.
inline void smooth_scalar(const Window& w, const ImagePlan& plan, int64_t H, int64_t W, const float* x, float* out) {
  const int64_t R = w.radius, stride = W + 2 * R;
  std::vector<float> grid(stride), along(H * W, 0.0f), column(W);
  for (int64_t r = 0; r < H; ++r) {
    const int64_t from = plan.rank[r * W], to = plan.rank[(r + 1) * W];
    if (from == to) continue;
    std::fill(grid.begin(), grid.end(), 0.0f);
    for (int64_t t = from; t < to; ++t) grid[R + plan.col[t]] = x[t];
    float* __restrict sum = along.data() + r * W;
    for (int64_t k = -R; k <= R; ++k) {
      const float weight = w(k);
      const float* __restrict in = grid.data() + R + k;
      for (int64_t c = 0; c < W; ++c) sum[c] += weight * in[c];
    }
  }
  for (int64_t r = 0; r < H; ++r) {
    const int64_t from = plan.rank[r * W], to = plan.rank[(r + 1) * W];
    if (from == to) continue;
    float* __restrict sum = column.data();
    std::fill(sum, sum + W, 0.0f);
    for (int64_t s = std::max<int64_t>(0, r - R); s <= std::min(H - 1, r + R); ++s) {
      const float weight = w(s - r);
      const float* __restrict in = along.data() + s * W;
      for (int64_t c = 0; c < W; ++c) sum[c] += weight * in[c];
    }
    for (int64_t t = from; t < to; ++t) out[t] = sum[plan.col[t]];
  }
}

// Places of the tokens, and the three ways to look them up.
inline void plan_places(const DechunkParams& p, int64_t b, ImagePlan& plan) {
  const int64_t H = p.H, W = p.W, L = H * W;
  plan.first = p.cu_seqlens[b];
  const int64_t M = plan.M = p.cu_seqlens[b + 1] - plan.first;
  plan.row.resize(M);
  plan.col.resize(M);
  plan.p.resize(M);
  plan.norm.resize(M);
  plan.near.resize(L);
  std::vector<int32_t> slot(L, -1);
  for (int64_t t = 0; t < M; ++t) {
    const int64_t place = p.index[plan.first + t] - b * L;
    plan.row[t] = int32_t(place / W);
    plan.col[t] = int32_t(place % W);
    slot[place] = int32_t(t);
    const bool forced = place == 0 || place == L - 1;
    const float prob = forced ? 1.0f : p.prob[b * L + place];
    plan.p[t] = std::min(std::max(prob, kClamp), 1.0f - kClamp);
  }
  nearest({slot.data(), plan.near.data(), H, W}, 0, 1);
  plan.rank.resize(L + 1);
  plan.column_start.assign(W + 1, 0);
  int32_t seen = 0;
  for (int64_t i = 0; i < L; ++i) {
    plan.rank[i] = seen;
    seen += slot[i] >= 0;
  }
  plan.rank[L] = seen;
  for (int64_t t = 0; t < M; ++t) ++plan.column_start[plan.col[t] + 1];
  std::partial_sum(plan.column_start.begin(), plan.column_start.end(), plan.column_start.begin());
  std::vector<int32_t> next(plan.column_start.begin(), plan.column_start.end() - 1);
  plan.column_token.resize(M);
  for (int64_t t = 0; t < M; ++t) plan.column_token[next[plan.col[t]]++] = int32_t(t);
}

// Row-times-channel steps of either way, weighed as measured: a separable step over rows loads once for kRows sums, and
// a listed neighbour costs its list entry and a row from anywhere. They meet at 5 to 10 % retained.
inline bool direct_is_cheaper(const Window& w, const ImagePlan& plan, int64_t H, int64_t W) {
  const int64_t R = w.radius, M = plan.M;
  const double rows = double(std::min(2 * R + kRows, H)), columns = double(std::min(2 * R + 1, W));
  const double separable = (0.5 * M * rows + 0.5 * H * W + M * columns) / 1.5;
  double direct = 0;
  for (int64_t t = 0; t < M && direct < separable; ++t) {
    const int64_t left = std::max<int64_t>(0, plan.col[t] - R), right = std::min(W, plan.col[t] + R + 1);
    const int64_t top = std::max<int64_t>(0, plan.row[t] - R), bottom = std::min(H, plan.row[t] + R + 1);
    for (int64_t r = top; r < bottom; ++r) direct += plan.rank[r * W + right] - plan.rank[r * W + left];
  }
  return direct < separable;
}

inline void list_neighbours(const Window& w, ImagePlan& plan, int64_t H, int64_t W) {
  const int64_t R = w.radius;
  plan.list_start.assign(1, 0);
  plan.list_token.clear();
  plan.list_weight.clear();
  for (int64_t t = 0; t < plan.M; ++t) {
    const int64_t left = std::max<int64_t>(0, plan.col[t] - R), right = std::min(W, plan.col[t] + R + 1);
    const int64_t top = std::max<int64_t>(0, plan.row[t] - R), bottom = std::min(H, plan.row[t] + R + 1);
    for (int64_t r = top; r < bottom; ++r) {
      const float weight = w(r - plan.row[t]);
      for (int32_t j = plan.rank[r * W + left]; j < plan.rank[r * W + right]; ++j) {
        plan.list_token.push_back(j);
        plan.list_weight.push_back(weight * w(plan.col[j] - plan.col[t]));
      }
    }
    plan.list_start.push_back(int32_t(plan.list_token.size()));
  }
}

void dechunk_plan(const DechunkParams& p, const Window& w, ImagePlan* plans, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    ImagePlan& plan = plans[b];
    plan_places(p, b, plan);
    smooth_scalar(w, plan, p.H, p.W, plan.p.data(), plan.norm.data());
    for (float& norm : plan.norm) norm += kEps;
    plan.direct = direct_is_cheaper(w, plan, p.H, p.W);
    if (plan.direct) list_neighbours(w, plan, p.H, p.W);
  }
}
