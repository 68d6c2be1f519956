// Rows through a map, with an optional position row added in float32.

template <class Number>
void rows_of(const RowsParams& p, int64_t begin, int64_t end) {
  const Number* x = static_cast<const Number*>(p.x);
  Number* out = static_cast<Number*>(p.out);
  const int64_t D = p.D;
  for (int64_t m = begin; m < end; ++m) {
    Number* __restrict to = out + m * D;
    const int64_t from = p.map[m];
    if (from < 0) {
      std::memset(static_cast<void*>(to), 0, D * sizeof(Number));
    } else if (p.pos == nullptr) {
      std::memcpy(static_cast<void*>(to), x + from * D, D * sizeof(Number));
    } else {
      const Number* __restrict row = x + from * D;
      const float* __restrict pos = p.pos + (from % p.L) * D;
      for (int64_t d = 0; d < D; ++d) store(to[d], load(row[d]) + pos[d]);
    }
  }
}

void rows(const RowsParams& p, int64_t begin, int64_t end) {
  switch (p.type) {
    case Type::f32: return rows_of<f32>(p, begin, end);
    case Type::bf16: return rows_of<bf16>(p, begin, end);
    case Type::f16: return rows_of<f16>(p, begin, end);
  }
}
