/* What of cuda.h fake_cuda.cpp needs, for machines without CUDA's toolkit. */
#pragma once
#include <cstddef>

typedef int CUdevice;
typedef unsigned long long CUdeviceptr, CUmemGenericAllocationHandle;
typedef struct context_ *CUcontext;
typedef struct module_ *CUmodule;
typedef struct function_ *CUfunction;
typedef struct stream_ *CUstream;
typedef struct event_ *CUevent;
typedef int CUdevice_attribute, CUmemAllocationHandleType, CUmemAllocationGranularity_flags;
struct CUuuid { char bytes[16]; };
struct CUipcMemHandle { char reserved[64]; };
struct CUipcEventHandle { char reserved[64]; };
struct CUmemLocation { int type, id; };
struct CUmemAccessDesc { CUmemLocation location; int flags; };
struct CUmemAllocationProp {
    int type, requestedHandleTypes;
    CUmemLocation location;
    void *win32HandleMetaData;
    unsigned char allocFlags[8];
};
enum CUresult {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_INVALID_VALUE = 1,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_INVALID_IMAGE = 200,
    CUDA_ERROR_INVALID_CONTEXT = 201,
    CUDA_ERROR_INVALID_HANDLE = 400,
    CUDA_ERROR_NOT_FOUND = 500,
    CUDA_ERROR_NOT_READY = 600,
    CUDA_ERROR_ILLEGAL_ADDRESS = 700,
    CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED = 712,
    CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED = 713,
    CUDA_ERROR_UNKNOWN = 999,
};
