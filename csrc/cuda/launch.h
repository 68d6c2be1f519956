// What the bindings call: launches on a stream, no torch and no vendor's header. Each returns null, or what went wrong as
// one line. Nothing here waits for the GPU. Maps are trusted as far as their values: an entry that points nowhere reads
// as dropped or is clamped, so that it cannot touch foreign memory, but only the CPU ops report it.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../include/params.h"

namespace dcdit {
namespace gpu {

// `workspace` is `select_workspace` bytes on the device; so for the others.
size_t select_workspace(const SelectParams&);
const char* select(const SelectParams&, void* workspace, void* stream);

size_t limit_workspace(const LimitParams&);
const char* limit(const LimitParams&, void* workspace, void* stream);

// `rows` of output, read from `source_rows` rows of x.
const char* rows(const RowsParams&, int64_t rows, int64_t source_rows, void* stream);

size_t nearest_workspace(const NearestParams&, int64_t B);
const char* nearest(const NearestParams&, int64_t B, void* workspace, void* stream);

// The fields of one CPU block (part_*) are not used; T counts the rows of h, padding included.
size_t dechunk_workspace(const DechunkParams&, bool backward);
const char* dechunk_forward(const DechunkParams&, void* workspace, void* stream);
const char* dechunk_backward(const DechunkParams&, void* workspace, void* stream);

}  // namespace gpu
}  // namespace dcdit
