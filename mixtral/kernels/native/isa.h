// One library, several instruction sets. What profits from them is compiled once for each, with the compiler's flags for
// it and MX_ISA set to its name, in the namespace mx::MX_ISA; which one runs is chosen when the library is loaded.
//
// Files compiled so must not instantiate templates of the standard library: the linker keeps one copy of each, and it
// might be one with instructions that this processor lacks. setup.py says which files they are.
#pragma once

namespace mx {

enum class Isa : int { portable, avx2, avx512 };

// The set in use; after loading the best one that both the build and the processor have.
Isa isa();

}  // namespace mx

// Declares a function that every instruction set defines: MX_EACH_ISA(void, scale, (float *x, int n)).
#define MX_EACH_ISA(result, name, parameters) \
  namespace portable {                        \
  result name parameters;                     \
  }                                           \
  MX_IF_AVX2(namespace avx2 { result name parameters; })     \
  MX_IF_AVX512(namespace avx512 { result name parameters; })

// The form of a function for the set in use: MX_PICK(scale)(x, n), inside namespace mx, in files compiled once.
#define MX_PICK(name) (MX_IF_AVX512(isa() == Isa::avx512 ? avx512::name :) \
                       MX_IF_AVX2(isa() == Isa::avx2 ? avx2::name :) portable::name)

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
