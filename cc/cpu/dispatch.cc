#include "cpu/dispatch.h"

#include <cstdlib>
#include <vector>

#include "cpu/processor.h"
#include "cpu/run.h"

namespace performer {
namespace cpu {

#define PERFORMER_DECLARE(isa)               \
  namespace isa {                            \
  const Kernels<float>& KernelsFor(float);   \
  const Kernels<double>& KernelsFor(double); \
  }
#ifdef PERFORMER_HAVE_V2
PERFORMER_DECLARE(v2)
#endif
#ifdef PERFORMER_HAVE_V3
PERFORMER_DECLARE(v3)
#endif
#ifdef PERFORMER_HAVE_V4
PERFORMER_DECLARE(v4)
#endif
#ifdef PERFORMER_HAVE_V4BF16
PERFORMER_DECLARE(v4bf16)
#endif
#ifdef PERFORMER_HAVE_NEON
PERFORMER_DECLARE(neon)
#endif
#ifdef PERFORMER_HAVE_GENERIC
PERFORMER_DECLARE(generic)
#endif

namespace {

struct Isa {
  const char* name;
  bool usable;
  const Kernels<float>& (*floats)(float);
  const Kernels<double>& (*doubles)(double);
};

#define PERFORMER_ISA_ENTRY(isa) \
  {#isa, PERFORMER_PROCESSOR_HAS(isa), isa::KernelsFor, isa::KernelsFor}

// All that were compiled; the best is the last.
const std::vector<Isa>& Compiled() {
  static const std::vector<Isa>& compiled = *new std::vector<Isa>{
#ifdef PERFORMER_HAVE_GENERIC
      PERFORMER_ISA_ENTRY(generic),
#endif
#ifdef PERFORMER_HAVE_NEON
      PERFORMER_ISA_ENTRY(neon),
#endif
#ifdef PERFORMER_HAVE_V2
      PERFORMER_ISA_ENTRY(v2),
#endif
#ifdef PERFORMER_HAVE_V3
      PERFORMER_ISA_ENTRY(v3),
#endif
#ifdef PERFORMER_HAVE_V4
      PERFORMER_ISA_ENTRY(v4),
#endif
#ifdef PERFORMER_HAVE_V4BF16
      PERFORMER_ISA_ENTRY(v4bf16),
#endif
  };
  return compiled;
}

Status Find(const std::string& name, const char* argument, const Isa** found) {
  std::string usable;
  for (const Isa& isa : Compiled()) {
    if (!isa.usable) continue;
    usable += (usable.empty() ? "" : ", ") + std::string(isa.name);
    *found = &isa;
    if (name == isa.name) return Status();
  }
  if (usable.empty())
    return Status::InvalidArgument("this build has no kernels that this processor can run");
  if (name.empty()) return Status();
  return Status::InvalidArgument(std::string(argument) + " must be one of " + usable +
                                 " on this processor; got '" + name + "'");
}

Status FindChosen(const std::string& isa, const Isa** found) {
  if (!isa.empty()) return Find(isa, "isa", found);
  const char* forced = std::getenv("PERFORMER_ISA");
  return Find(forced == nullptr ? "" : forced, "the environment variable PERFORMER_ISA", found);
}

}  // namespace

std::vector<std::string> AvailableIsas() {
  std::vector<std::string> names;
  for (const Isa& isa : Compiled())
    if (isa.usable) names.push_back(isa.name);
  return names;
}

Status ChosenIsa(std::string* isa) {
  const Isa* found = nullptr;
  PERFORMER_RETURN_IF_ERROR(FindChosen("", &found));
  *isa = found->name;
  return Status();
}

Status FindKernels(const std::string& isa, const Kernels<float>** kernels) {
  const Isa* found = nullptr;
  PERFORMER_RETURN_IF_ERROR(FindChosen(isa, &found));
  *kernels = &found->floats(0);
  return Status();
}

Status FindKernels(const std::string& isa, const Kernels<double>** kernels) {
  const Isa* found = nullptr;
  PERFORMER_RETURN_IF_ERROR(FindChosen(isa, &found));
  *kernels = &found->doubles(0);
  return Status();
}

}  // namespace cpu
}  // namespace performer
