// What the CPU operators share.
#pragma once

#include <algorithm>

// One copy of a hot loop for each generation of x86 processors; the loader takes the best. Without contraction and
// reassociation all copies give the same bits.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define SITFAST_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define SITFAST_CLONES
#endif
