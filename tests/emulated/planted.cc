#include "emulated/planted.h"

#include <map>

#include "emulated/planted.cuh"

namespace performer {
namespace planted {

bool Run(const std::string& name, bool bug, unsigned blocks, unsigned threads, const float* x,
         float* out) {
  using Kernel = void (*)(Params);
  const std::map<std::string, Kernel> kernels = {
      {"MissingBarrier", MissingBarrier},
      {"ReusedBuffer", ReusedBuffer},
      {"MissingSyncWarp", MissingSyncWarp},
      {"MissingWait", MissingWait},
      {"DivergentBarrier", DivergentBarrier},
      {"DivergentShuffle", DivergentShuffle},
      {"BlocksRace", BlocksRace},
      {"Misaligned", Misaligned},
      {"BankConflicts", BankConflicts},
      {"OutOfBounds", OutOfBounds},
      {"BehindOutput", BehindOutput},
      {"BeforeOutput", BeforeOutput},
      {"MmaBFloat16", OneMma<cuda::MmaM16N8K16<cuda::BFloat16>>},
      {"MmaHalf", OneMma<cuda::MmaM16N8K16<cuda::Half>>},
      {"MmaTf32", OneMma<cuda::MmaTf32M16N8K8>},
      {"LdMatrix", OneLdMatrix<false>},
      {"LdMatrixTrans", OneLdMatrix<true>},
  };
  const auto found = kernels.find(name);
  if (found == kernels.end()) return false;
  const Params params = {x, out, bug};
  sim::Launch(found->first.c_str(), dim3(blocks), dim3(threads), size_t{16} * threads,
              [&] { found->second(params); });
  return true;
}

}  // namespace planted
}  // namespace performer
