// SPDX-License-Identifier: Apache-2.0
// A CUDA driver that does nothing and says that all went well: what triton calls between its compiler and a launch.
#include "cuda.h"

#define CONTEXT ((CUcontext)1)
#define DONE return CUDA_SUCCESS

static int launches;

// Not CUDA's: how many launches have come this far.
int launches_so_far(void) { return launches; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
  launches++;
  DONE;
}

CUresult cuGetErrorString(CUresult error, const char **text) { *text = "of a driver that does nothing"; DONE; }

// What triton asks for from 3.7 and 3.9 on.
CUresult cuDriverGetVersion(int *version) { *version = 13020; DONE; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; DONE; }
CUresult cuModuleUnload(CUmodule module) { DONE; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  DONE;
}

CUresult cuCtxGetCurrent(CUcontext *context) { *context = CONTEXT; DONE; }
CUresult cuCtxSetCurrent(CUcontext context) { DONE; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; DONE; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { DONE; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = CONTEXT; DONE; }

CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = 0; DONE; }
// One attribute alone is compared with anything: the shared memory that a kernel may ask for, here Hopper's.
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) { *value = 232448; DONE; }

CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = (CUmodule)1; DONE; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)1;
  DONE;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  DONE;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { DONE; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { DONE; }

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
  *(CUdeviceptr *)value = address;
  DONE;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  DONE;
}
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
  *count = 1;
  DONE;
}
