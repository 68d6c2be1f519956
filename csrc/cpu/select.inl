// Natural set, tail drop and packing maps. Integers only after the first comparison: the same bits everywhere.

// How many of n natural tokens go. The product is float32 on purpose: in double the count differs for some n.
inline int64_t drop_count(int64_t n, float tail_drop) {
  const float product = float(n) * tail_drop;
  if (!(product > 0.0f)) return 0;  // NaN too
  return product < float(n) ? std::min(int64_t(product), n - 2) : n - 2;
}

void select_images(const SelectParams& p, int64_t begin, int64_t end) {
  const int64_t L = p.L;
  std::vector<uint64_t> key;
  for (int64_t b = begin; b < end; ++b) {
    const float* __restrict prob = p.prob + b * L;
    bool* __restrict natural = p.natural + b * L;
    bool* __restrict retained = p.retained + b * L;
    int64_t n = 0;
    for (int64_t i = 0; i < L; ++i) natural[i] = prob[i] > 0.5f;
    natural[0] = natural[L - 1] = true;
    for (int64_t i = 0; i < L; ++i) n += natural[i];
    std::memcpy(retained, natural, L * sizeof(bool));

    const int64_t drop = drop_count(n, p.tail_drop[b]);
    if (drop > 0) {
      // Bits of a positive float order like the float; the place below them is reversed, so that among equals the
      // highest place goes first. The forced tokens are no candidates.
      key.clear();
      for (int64_t i = 1; i < L - 1; ++i)
        if (natural[i]) key.push_back(uint64_t(as_bits(prob[i])) << 32 | uint32_t(~uint32_t(i)));
      std::nth_element(key.begin(), key.begin() + (drop - 1), key.end());
      for (int64_t k = 0; k < drop; ++k) retained[uint32_t(~uint32_t(key[k]))] = false;
    }

    int32_t* __restrict slot = p.slot + b * L;
    int32_t row = 0;
    for (int64_t i = 0; i < L; ++i) {
      slot[i] = retained[i] ? row : -1;
      row += retained[i];
    }
    p.cu_seqlens[b + 1] = row;
  }
}

void select_pack(const SelectParams& p, int64_t begin, int64_t end) {
  const int64_t L = p.L;
  for (int64_t b = begin; b < end; ++b) {
    const int32_t first = p.cu_seqlens[b];
    int32_t* __restrict slot = p.slot + b * L;
    int32_t* __restrict index = p.index + first;
    for (int64_t i = 0; i < L; ++i) {
      if (slot[i] < 0) continue;
      index[slot[i]] = int32_t(b * L + i);
      slot[i] += first;
    }
  }
}
