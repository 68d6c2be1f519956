// A fixed capacity: of more retained tokens than fit, the least probable ones of the whole batch go. Integers only.

void limit(const LimitParams& p) {
  const int64_t B = p.B, L = p.L, N = B * L;
  int64_t count = 0;
  for (int64_t i = 0; i < N; ++i) count += p.retained_in[i];
  std::memcpy(p.retained, p.retained_in, N * sizeof(bool));
  const int64_t drop = std::max<int64_t>(0, count - p.capacity);
  *p.overflow = int32_t(drop);
  if (drop > 0) {
    // Signed order of the bits, made unsigned; the place below them is reversed, so that among equals the highest place
    // of the batch goes first. The forced tokens are no candidates.
    std::vector<uint64_t> key;
    key.reserve(count);
    for (int64_t b = 0; b < B; ++b)
      for (int64_t i = b * L + 1; i < (b + 1) * L - 1; ++i)
        if (p.retained_in[i]) key.push_back(uint64_t(as_bits(p.prob[i]) ^ 0x80000000u) << 32 | uint32_t(~uint32_t(i)));
    std::nth_element(key.begin(), key.begin() + (drop - 1), key.end());
    for (int64_t k = 0; k < drop; ++k) p.retained[uint32_t(~uint32_t(key[k]))] = false;
  }
  int32_t row = 0;
  p.cu_seqlens[0] = 0;
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t i = b * L; i < (b + 1) * L; ++i) {
      p.slot[i] = p.retained[i] ? row : -1;
      if (p.retained[i]) p.index[row++] = int32_t(i);
    }
    p.cu_seqlens[b + 1] = row;
  }
  for (int64_t t = row; t < p.capacity; ++t) p.index[t] = -1;
}
