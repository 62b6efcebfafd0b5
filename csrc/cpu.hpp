// LDMSEG_X86: functions may be built for instruction sets beyond the baseline, and chosen when they run.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(LDMSEG_BASELINE_ONLY)
#define LDMSEG_X86 1
#include <immintrin.h>
#else
#define LDMSEG_X86 0
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))
