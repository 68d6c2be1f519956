"""How far drawn pictures are from real ones: feature sets, Frechet distances, inception score, precision and recall."""
