// A libcuda that answers success and remembers the last launch, so that Triton's own launcher runs without a GPU.
// Built by cuda_stub.py. Functions that Triton looks up and never calls here take no arguments.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef int Result;
enum { kMaxParameters = 256 };

static long long launches = 0;
static unsigned grid[3];
static unsigned char bytes[kMaxParameters][8];
static int sizes[kMaxParameters], parameters = 0;

// For the tests: how large the parameters of the next launches are, how many launches there were, what the last got.
void stub_expect(int count, const int* each) {
  parameters = count;
  memcpy(sizes, each, count * sizeof *sizes);
}
long long stub_launches(void) { return launches; }
unsigned stub_grid(int axis) { return grid[axis]; }
long long stub_parameter(int i) {
  int32_t narrow;
  int64_t wide;
  memcpy(&narrow, bytes[i], 4);
  memcpy(&wide, bytes[i], 8);
  return sizes[i] == 4 ? narrow : wide;
}

Result cuLaunchKernelEx(const void* config, void* function, void** given, void** extra) {
  ++launches;
  memcpy(grid, config, sizeof grid);  // the first three fields
  for (int i = 0; i < parameters; ++i) memcpy(bytes[i], given[i], sizes[i]);
  return 0;
}

// Capability 9.0, 132 multiprocessors, shared memory as on an H100; the rest are limits that must not be in the way.
Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 75: *value = 9; break;
    case 76: *value = 0; break;
    case 16: *value = 132; break;
    case 10: *value = 32; break;
    case 8: *value = 49152; break;
    case 97: *value = 232448; break;
    case 81: *value = 233472; break;
    case 82: *value = 65536; break;
    default: *value = 1024;
  }
  return 0;
}
Result cuFuncGetAttribute(int* value, int attribute, void* function) {
  *value = attribute == 0 ? 1024 : 0;  // the most threads a block
  return 0;
}
Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int* version) { *version = 13000; return 0; }
Result cuDeviceGetCount(int* count) { *count = 1; return 0; }
Result cuDeviceGet(int* device, int ordinal) { *device = 0; return 0; }
Result cuCtxGetCurrent(void** context) { *context = (void*)1; return 0; }
Result cuCtxSetCurrent(void* context) { return 0; }
Result cuCtxGetDevice(int* device) { *device = 0; return 0; }
Result cuCtxGetLimit(size_t* value, int limit) { *value = 0; return 0; }
Result cuCtxSetLimit(int limit, size_t value) { return 0; }
Result cuDevicePrimaryCtxRetain(void** context, int device) { *context = (void*)1; return 0; }
Result cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }
Result cuFuncSetCacheConfig(void* function, int config) { return 0; }
Result cuGetErrorString(Result error, const char** text) { *text = "stub"; return 0; }
Result cuModuleLoadData(void** module, const void* image) { *module = (void*)2; return 0; }
Result cuModuleGetFunction(void** function, void* module, const char* name) { *function = (void*)3; return 0; }
Result cuModuleUnload(void* module) { return 0; }
Result cuOccupancyMaxActiveClusters(int* count, void* function, void* config) { *count = 1; return 0; }
Result cuPointerGetAttribute(void* value, int attribute, uint64_t pointer) { memcpy(value, &pointer, 8); return 0; }
Result cuStreamIsCapturing(void* stream, int* status) { *status = 0; return 0; }
Result cuTensorMapEncodeTiled(void) { return 1; }
Result cuTensorMapEncodeIm2col(void) { return 1; }
