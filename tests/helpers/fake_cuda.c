/* A CUDA driver without a GPU that keeps the real one's rules: what needs a context has one, and
   nothing is copied before the stream is waited for. cuda-bindings loads it as libcuda.so.1.
   Built by tests: cc -shared -fPIC fake_cuda.c -o libcuda.so.1 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { void *to, *from; size_t n; } Copy;
typedef struct { Copy copies[16]; int count; } Graph;
typedef struct { int at; } Event;

static __thread int depth;
static Graph queue, *capturing;
static char failing[64];
static int failing_status, alive, clock_ms;

int fake_alive(void) { return alive; }
int fake_depth(void) { return depth; }
void fake_fail(const char *name, int status) {
  snprintf(failing, sizeof failing, "%s", name);
  failing_status = status;
}
#define ENTER(name) if (!strcmp(failing, name)) return failing_status
#define NEEDS_CONTEXT(name) ENTER(name); if (!depth) return 201 /* CUDA_ERROR_INVALID_CONTEXT */

int cuInit(unsigned flags) { ENTER("cuInit"); return flags; }
int cuDriverGetVersion(int *version) { *version = 12060; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 40 + ordinal; return 0; }
int cuDeviceGetName(char *name, int length, int device) {
  if (device != 40) return 101;
  return snprintf(name, length, "Orin") >= length;
}
int cuDeviceGetAttribute(int *value, int which, int device) {
  *value = which == 75 ? 8 : 7;
  return device == 40 && (which == 75 || which == 76) ? 0 : 1;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &queue; alive++; return device != 40; }
int cuDevicePrimaryCtxRelease(int device) { alive--; return device != 40; }
int cuCtxPushCurrent(void *context) { depth++; return context == &queue ? 0 : 201; }
int cuCtxPopCurrent(void **context) { *context = &queue; return depth-- ? 0 : 201; }
int cuStreamCreate(void **stream, unsigned flags) {
  NEEDS_CONTEXT("cuStreamCreate");
  *stream = (void *)4711; alive++;
  return flags;
}
int cuStreamDestroy(void *stream) { NEEDS_CONTEXT("cuStreamDestroy"); alive--; return stream != (void *)4711; }
int cuMemAlloc(unsigned long long *address, size_t n) {
  NEEDS_CONTEXT("cuMemAlloc");
  if (!n || n > 1000000) return 2; /* CUDA_ERROR_OUT_OF_MEMORY */
  *address = (unsigned long long)memset(malloc(n), 0xA5, n); alive++;
  return 0;
}
int cuMemFree(unsigned long long address) { NEEDS_CONTEXT("cuMemFree"); free((void *)address); alive--; return 0; }
int cuMemHostAlloc(void **address, size_t n, unsigned flags) {
  NEEDS_CONTEXT("cuMemHostAlloc");
  *address = malloc(n); alive++;
  return flags;
}
int cuMemFreeHost(void *address) { NEEDS_CONTEXT("cuMemFreeHost"); free(address); alive--; return 0; }
static int put(void *to, void *from, size_t n, void *stream) {
  Graph *into = capturing ? capturing : &queue;
  if (stream != (void *)4711 || into->count == 16) return 1;
  into->copies[into->count++] = (Copy){to, from, n};
  return 0;
}
int cuMemcpyHtoDAsync(unsigned long long to, void *from, size_t n, void *stream) {
  NEEDS_CONTEXT("cuMemcpyHtoDAsync");
  return put((void *)to, from, n, stream);
}
int cuMemcpyDtoDAsync(unsigned long long to, unsigned long long from, size_t n, void *stream) {
  NEEDS_CONTEXT("cuMemcpyDtoDAsync");
  return put((void *)to, (void *)from, n, stream);
}
int cuMemcpyDtoHAsync(void *to, unsigned long long from, size_t n, void *stream) {
  NEEDS_CONTEXT("cuMemcpyDtoHAsync");
  return put(to, (void *)from, n, stream);
}
int cuEventCreate(void **event, unsigned flags) {
  NEEDS_CONTEXT("cuEventCreate");
  *event = calloc(1, sizeof(Event)); alive++;
  return flags;
}
int cuEventRecord(void *event, void *stream) {
  NEEDS_CONTEXT("cuEventRecord");
  ((Event *)event)->at = clock_ms++;
  return stream != (void *)4711;
}
int cuEventElapsedTime(float *ms, void *start, void *end) {
  NEEDS_CONTEXT("cuEventElapsedTime");
  *ms = ((Event *)end)->at - ((Event *)start)->at;
  return 0;
}
int cuEventDestroy(void *event) { NEEDS_CONTEXT("cuEventDestroy"); free(event); alive--; return 0; }
int cuStreamBeginCapture(void *stream, int mode) {
  NEEDS_CONTEXT("cuStreamBeginCapture");
  if (stream != (void *)4711 || mode != 1 || capturing) return 1;
  capturing = calloc(1, sizeof(Graph)); alive++;
  return 0;
}
int cuStreamEndCapture(void *stream, void **graph) {
  Graph *captured = capturing;
  capturing = NULL; /* ended, whatever comes of it */
  if (!strcmp(failing, "cuStreamEndCapture")) { free(captured); alive--; *graph = NULL; return failing_status; }
  *graph = captured;
  return stream != (void *)4711 || !captured;
}
int cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) {
  NEEDS_CONTEXT("cuGraphInstantiate");
  *executable = memcpy(malloc(sizeof(Graph)), graph, sizeof(Graph)); alive++;
  return (int)flags;
}
int cuGraphDestroy(void *graph) { NEEDS_CONTEXT("cuGraphDestroy"); free(graph); alive--; return 0; }
int cuGraphExecDestroy(void *graph) { NEEDS_CONTEXT("cuGraphExecDestroy"); free(graph); alive--; return 0; }
int cuGraphLaunch(void *executable, void *stream) {
  NEEDS_CONTEXT("cuGraphLaunch");
  Graph *graph = executable;
  for (int i = 0; i < graph->count; i++) {
    Copy *one = &graph->copies[i];
    if (put(one->to, one->from, one->n, stream)) return 1;
  }
  return 0;
}
int cuStreamSynchronize(void *stream) {
  NEEDS_CONTEXT("cuStreamSynchronize");
  for (int i = 0; i < queue.count; i++) memcpy(queue.copies[i].to, queue.copies[i].from, queue.copies[i].n);
  queue.count = 0;
  return stream != (void *)4711;
}
/* cuda-bindings asks for every function of the driver's newest interface by its name. */
int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags, int *found) {
  (void)version; (void)flags;
  *function = dlsym(RTLD_DEFAULT, name);
  if (!*function) {
    static void *self;
    if (!self) self = dlopen("libcuda.so.1", RTLD_NOW);
    *function = dlsym(self, !strcmp(name, "cuGraphInstantiate") ? "cuGraphInstantiateWithFlags" : name);
  }
  if (found) *found = *function ? 0 : 1;
  return 0;
}
int cuGetProcAddress(const char *name, void **function, int version, unsigned long long flags) {
  return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
