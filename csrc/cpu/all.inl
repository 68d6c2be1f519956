// Every kernel, inside the namespace of the instruction set that includes this file.
namespace dcdit {
namespace DCDIT_ISA {

#include "number.inl"

#include "adaln.inl"
#include "gather.inl"
#include "limit.inl"
#include "nearest.inl"
#include "select.inl"

#include "plan.inl"
#include "smooth.inl"
#include "dechunk.inl"

#define DCDIT_STRING_(x) #x
#define DCDIT_STRING(x) DCDIT_STRING_(x)
extern const Kernels table = {DCDIT_STRING(DCDIT_ISA), select_images, select_pack,      rows,         nearest,
                             dechunk_plan,  dechunk_forward, dechunk_backward, dechunk_sums, dechunk_scratch,
                             limit,         modulate,        modulate_backward, add_gated,  add_gated_backward};

}  // namespace DCDIT_ISA
}  // namespace dcdit
