/* For LD_PRELOAD under glibc: writes down every allocation and release of 256 bytes or more between count_start and
 * count_stop, whoever makes it (torch's allocator, the C++ of a kernel). Used by chunking_memory.py. */
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);
extern void __libc_free(void*);

enum { kEvents = 1 << 20, kLeast = 256 };
struct event {
  uintptr_t at;
  int64_t bytes; /* negative: released */
};
static struct event events[kEvents];
static atomic_long count;
static atomic_int on;

static void* note(void* at, int sign) {
  if (at && atomic_load(&on)) {
    const int64_t bytes = (int64_t)malloc_usable_size(at);
    if (bytes >= kLeast) {
      const long k = atomic_fetch_add(&count, 1);
      if (k < kEvents) events[k] = (struct event){(uintptr_t)at, sign * bytes};
    }
  }
  return at;
}

void count_start(void) {
  atomic_store(&count, 0);
  atomic_store(&on, 1);
}
/* How many events there are; more than kEvents means that some were lost. */
long count_stop(void) {
  atomic_store(&on, 0);
  return atomic_load(&count);
}
struct event* count_events(void) { return events; }
long count_room(void) { return kEvents; }

void* malloc(size_t size) { return note(__libc_malloc(size), 1); }
void* calloc(size_t n, size_t size) { return note(__libc_calloc(n, size), 1); }
void* memalign(size_t align, size_t size) { return note(__libc_memalign(align, size), 1); }
void* aligned_alloc(size_t align, size_t size) { return memalign(align, size); }
int posix_memalign(void** out, size_t align, size_t size) {
  void* at = memalign(align, size);
  if (!at) return ENOMEM;
  *out = at;
  return 0;
}
void* realloc(void* old, size_t size) {
  note(old, -1);
  return note(__libc_realloc(old, size), 1);
}
void free(void* at) {
  note(at, -1);
  __libc_free(at);
}
