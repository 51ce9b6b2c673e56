// One library, several instruction sets. What profits from them lies in files named *.isa.cpp, each compiled once a set
// with the compiler's flags for it and MX_ISA set to its name, in the namespace mx::MX_ISA; the set that runs is chosen
// when the library is loaded.
//
// A *.isa.cpp file must not instantiate templates of the standard library, and keeps its own inline functions in an
// unnamed namespace: the linker keeps one copy of what has one name, and it might be one that this processor cannot run.
#pragma once

namespace mx {

enum class Isa : int { portable, avx2, avx512 };

// The set in use; at first the best one that both the build and the processor have.
Isa isa();

}  // namespace mx

// setup.py defines MX_HAVE_... for the sets that the compiler knows.
#ifdef MX_HAVE_AVX2
#define MX_IF_AVX2(...) __VA_ARGS__
#else
#define MX_IF_AVX2(...)
#endif

#ifdef MX_HAVE_AVX512
#define MX_IF_AVX512(...) __VA_ARGS__
#else
#define MX_IF_AVX512(...)
#endif

// Declares a function that every instruction set defines: MX_EACH_ISA(void, scale, (float *x, int n)), inside mx.
#define MX_EACH_ISA(result, name, parameters)            \
  namespace portable {                                   \
  result name parameters;                                \
  }                                                      \
  MX_IF_AVX2(namespace avx2 { result name parameters; }) \
  MX_IF_AVX512(namespace avx512 { result name parameters; })

// The form of such a function for the set in use: MX_PICK(scale)(x, n), inside mx, in files that are compiled once.
#define MX_PICK(name)                                         \
  (MX_IF_AVX512(isa() == Isa::avx512 ? avx512::name :)        \
   MX_IF_AVX2(isa() == Isa::avx2 ? avx2::name :) portable::name)
