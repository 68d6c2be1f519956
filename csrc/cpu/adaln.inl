// adaLN of packed tokens: the vectors of an image are read where its rows are, never spread over them. Rows that no image
// owns (the padding of a fixed capacity) are zero in what is computed anew and pass on no gradient.

template <class X, class Out>
void modulate_rows(const ModulateParams& p, int64_t begin, int64_t end) {
  const int64_t D = p.D;
  int64_t b = 0;
  for (int64_t t = begin; t < end; ++t) {
    while (b < p.B && p.cu_seqlens[b + 1] <= t) ++b;
    Out* __restrict out = static_cast<Out*>(p.out) + t * D;
    if (b == p.B) {
      std::memset(static_cast<void*>(out), 0, D * sizeof(Out));
      continue;
    }
    const X* __restrict x = static_cast<const X*>(p.x) + t * D;
    const float* __restrict shift = p.shift + b * p.shift_stride;
    const float* __restrict scale = p.scale + b * p.scale_stride;
    for (int64_t d = 0; d < D; ++d) store(out[d], load(x[d]) * (1.0f + scale[d]) + shift[d]);
  }
}

template <class X, class Y>
void add_gated_rows(const AddGatedParams& p, int64_t begin, int64_t end) {
  const int64_t D = p.D;
  int64_t b = 0;
  for (int64_t t = begin; t < end; ++t) {
    while (b < p.B && p.cu_seqlens[b + 1] <= t) ++b;
    const X* __restrict x = static_cast<const X*>(p.x) + t * D;
    X* __restrict out = static_cast<X*>(p.out) + t * D;
    if (b == p.B) {
      std::memcpy(static_cast<void*>(out), x, D * sizeof(X));
      continue;
    }
    const Y* __restrict y = static_cast<const Y*>(p.y) + t * D;
    const float* __restrict gate = p.gate + b * p.gate_stride;
    for (int64_t d = 0; d < D; ++d) store(out[d], load(x[d]) + gate[d] * load(y[d]));
  }
}

// Sums over an image's rows, in the order of the rows whatever the threads: first over kRun rows, then over the runs,
// so that rounding does not grow with the length of the image.
constexpr int64_t kRun = 64;

template <class X, class Out>
void modulate_sums(const ModulateParams& p, int64_t b, int64_t from, int64_t n) {
  constexpr int64_t kBlock = ModulateParams::kBlock;
  float scale1[kBlock], run_shift[kBlock], run_scale[kBlock];
  float* __restrict dshift = p.dshift + b * p.D + from;
  float* __restrict dscale = p.dscale + b * p.D + from;
  for (int64_t d = 0; d < n; ++d) {
    scale1[d] = 1.0f + p.scale[b * p.scale_stride + from + d];
    dshift[d] = dscale[d] = 0.0f;
  }
  const int64_t end = p.cu_seqlens[b + 1];
  for (int64_t first = p.cu_seqlens[b]; first < end; first += kRun) {
    std::memset(run_shift, 0, sizeof run_shift);
    std::memset(run_scale, 0, sizeof run_scale);
    for (int64_t t = first; t < std::min(end, first + kRun); ++t) {
      const X* __restrict x = static_cast<const X*>(p.x) + t * p.D + from;
      const Out* __restrict grad = static_cast<const Out*>(p.grad) + t * p.D + from;
      X* __restrict dx = static_cast<X*>(p.dx) + t * p.D + from;
      for (int64_t d = 0; d < n; ++d) {
        const float g = load(grad[d]);
        run_shift[d] += g;
        run_scale[d] += g * load(x[d]);
        store(dx[d], g * scale1[d]);
      }
    }
    for (int64_t d = 0; d < n; ++d) {
      dshift[d] += run_shift[d];
      dscale[d] += run_scale[d];
    }
  }
}

template <class X, class Y>
void add_gated_sums(const AddGatedParams& p, int64_t b, int64_t from, int64_t n) {
  float run[AddGatedParams::kBlock];
  float* __restrict dgate = p.dgate + b * p.D + from;
  const float* __restrict gate = p.gate + b * p.gate_stride + from;
  for (int64_t d = 0; d < n; ++d) dgate[d] = 0.0f;
  const int64_t end = p.cu_seqlens[b + 1];
  for (int64_t first = p.cu_seqlens[b]; first < end; first += kRun) {
    std::memset(run, 0, sizeof run);
    for (int64_t t = first; t < std::min(end, first + kRun); ++t) {
      const Y* __restrict y = static_cast<const Y*>(p.y) + t * p.D + from;
      const X* __restrict grad = static_cast<const X*>(p.grad) + t * p.D + from;
      Y* __restrict dy = static_cast<Y*>(p.dy) + t * p.D + from;
      for (int64_t d = 0; d < n; ++d) {
        const float g = load(grad[d]);
        run[d] += g * load(y[d]);
        store(dy[d], g * gate[d]);
      }
    }
    for (int64_t d = 0; d < n; ++d) dgate[d] += run[d];
  }
}

// Calls work with a number of that type.
template <class Work>
void with_type(Type type, const Work& work) {
  switch (type) {
    case Type::f32: return work(f32{});
    case Type::bf16: return work(bf16{});
    case Type::f16: return work(f16{});
  }
}

template <class Work>
void with_types(Type one, Type two, const Work& work) {
  with_type(one, [&](auto a) { with_type(two, [&](auto b) { work(a, b); }); });
}

void modulate(const ModulateParams& p, int64_t begin, int64_t end) {
  with_types(p.x_type, p.out_type, [&](auto x, auto out) { modulate_rows<decltype(x), decltype(out)>(p, begin, end); });
}

void add_gated(const AddGatedParams& p, int64_t begin, int64_t end) {
  with_types(p.x_type, p.y_type, [&](auto x, auto y) { add_gated_rows<decltype(x), decltype(y)>(p, begin, end); });
}

void modulate_backward(const ModulateParams& p, int64_t b, int64_t block) {
  const int64_t from = block * ModulateParams::kBlock, n = std::min(ModulateParams::kBlock, p.D - from);
  with_types(p.x_type, p.out_type, [&](auto x, auto out) { modulate_sums<decltype(x), decltype(out)>(p, b, from, n); });
}

void add_gated_backward(const AddGatedParams& p, int64_t b, int64_t block) {
  const int64_t from = block * AddGatedParams::kBlock, n = std::min(AddGatedParams::kBlock, p.D - from);
  with_types(p.x_type, p.y_type, [&](auto x, auto y) { add_gated_sums<decltype(x), decltype(y)>(p, b, from, n); });
}
