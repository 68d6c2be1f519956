// Exact Euclidean distance transform that carries its argmin: minima of the packed key (squared distance, place), first
// along rows, then across them. Ties fall to the lowest place by the order of the key.

template <class Key>
void nearest_images(const NearestParams& p, int64_t begin, int64_t end) {
  const int64_t H = p.H, W = p.W, L = H * W;
  const Key far = Key((H * H + W * W) * L);  // beyond every distance on the grid
  std::vector<Key> in_row(L), best(W);
  for (int64_t b = begin; b < end; ++b) {
    const int32_t* slot = p.slot + b * L;
    for (int64_t r = 0; r < H; ++r) {
      Key* __restrict key = in_row.data() + r * W;
      const int32_t* __restrict row = slot + r * W;
      int64_t last = -1;
      for (int64_t c = 0; c < W; ++c) {
        if (row[c] >= 0) last = c;
        key[c] = last < 0 ? far : Key((c - last) * (c - last) * L + r * W + last);
      }
      last = -1;
      for (int64_t c = W - 1; c >= 0; --c) {
        if (row[c] >= 0) last = c;
        const Key right = last < 0 ? far : Key((last - c) * (last - c) * L + r * W + last);
        key[c] = std::min(key[c], right);
      }
    }
    for (int64_t r = 0; r < H; ++r) {
      Key* __restrict to = best.data();
      for (int64_t c = 0; c < W; ++c) to[c] = far;
      for (int64_t s = 0; s < H; ++s) {
        const Key step = Key((r - s) * (r - s) * L);
        const Key* __restrict key = in_row.data() + s * W;
        for (int64_t c = 0; c < W; ++c) to[c] = std::min<Key>(to[c], key[c] + step);
      }
      int32_t* __restrict out = p.nearest + b * L + r * W;
      for (int64_t c = 0; c < W; ++c) out[c] = to[c] < far ? slot[to[c] % L] : -1;
    }
  }
}

void nearest(const NearestParams& p, int64_t begin, int64_t end) {
  const int64_t H = p.H, W = p.W;
  // The largest key, an empty row seen from the farthest row, decides the width.
  if ((2 * H * H + W * W + 1) * H * W < std::numeric_limits<int32_t>::max())
    nearest_images<int32_t>(p, begin, end);
  else
    nearest_images<int64_t>(p, begin, end);
}
