"""A stand-in for a CUDA driver and NVML, compiled here: two GPUs, which NVML knows by their buses."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = r"""
#include <cstdio>
#include <cstdlib>
#include <cstring>
static const char* buses[] = {"0000:01:00.0", "0000:81:00.0"};
static bool has(const char* name) { return getenv(name) != nullptr; }
struct Memory { unsigned long long total, free, used; };
extern "C" {
int cuInit(unsigned) { return has("NO_START") ? 802 : 0; }
int cuGetErrorString(int, const char** text) { *text = "system not yet initialized"; return 0; }
int cuDriverGetVersion(int* version) { *version = has("OLD_DRIVER") ? 12040 : 13000; return 0; }
int cuDeviceGetCount(int* count) { *count = has("ONE") ? 1 : 2; return 0; }
int cuDeviceGet(int* device, int number) { *device = number; return 0; }
int cuDeviceGetName(char* name, int size, int) { snprintf(name, size, "NVIDIA H100 80GB HBM3"); return 0; }
int cuDeviceTotalMem_v2(size_t* size, int) { *size = 85ull * 1000 * 1000 * 1000; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 75 ? (has("TURING") ? 7 : 9) : attribute == 76 ? (has("TURING") ? 5 : 0) : -1;
  return *value < 0;
}
int cuDeviceGetUuid_v2(char* uuid, int device) { memset(uuid, 0x10 + device, 16); return 0; }
int cuDeviceGetPCIBusId(char* name, int size, int device) { snprintf(name, size, "%s", buses[1 - device]); return 0; }
int cuDeviceCanAccessPeer(int* can, int one, int other) { *can = one != other && !has("NO_PEERS"); return 0; }
int nvmlInitWithFlags(unsigned) { return 0; }
int nvmlShutdown() { return 0; }
const char* nvmlErrorString(int) { return "Not Supported"; }
int nvmlSystemGetDriverVersion(char* text, unsigned size) { snprintf(text, size, "580.65.06"); return 0; }
int nvmlDeviceGetCount_v2(unsigned* count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, long* handle) { *handle = index + 1; return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char* bus, long* handle) {
  for (long n = 0; n < 2; n++) if (!strcmp(bus, buses[n])) { *handle = n + 1; return 0; }
  return 6;
}
int nvmlDeviceGetName(long, char* name, unsigned size) { snprintf(name, size, "NVIDIA H100 80GB HBM3"); return 0; }
int nvmlDeviceGetMemoryInfo(long, Memory* memory) { *memory = {85ull * 1000 * 1000 * 1000, 0, 0}; return 0; }
int nvmlDeviceGetCudaComputeCapability(long, int* major, int* minor) { *major = 9; *minor = 0; return 0; }
int nvmlDeviceGetMigMode(long, unsigned* now, unsigned* pending) { *now = *pending = has("SLICED"); return 0; }
int nvmlDeviceGetTopologyCommonAncestor(long, long, unsigned* level) { *level = 50; return 0; }
int nvmlDeviceGetP2PStatus(long, long, int index, int* status) {
  *status = index == 2 && has("NVLINK") ? 0 : 5;
  return 0;
}
}
"""


def library(place: Path) -> str:
    """Compiles it into a directory; returns the value of ``LD_LIBRARY_PATH`` that finds it there."""
    pytest.importorskip("pynvml")
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    (place / "driver.cpp").write_text(SOURCE)
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        subprocess.run(["g++", "-shared", "-fPIC", "-o", place / name, place / "driver.cpp"], check=True)
    return os.pathsep.join([str(place), os.environ.get("LD_LIBRARY_PATH", "")])
