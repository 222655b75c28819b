#include "cpu/isa.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <stdexcept>

namespace pyllm {
namespace {

constexpr std::array<const char*, 3> kNames = {"baseline", "avx2", "avx512"};

bool is_built(Isa isa) {
#ifdef PYLLM_X86_ISAS
  (void)isa;
  return true;
#else
  return isa == Isa::baseline;
#endif
}

// __builtin_cpu_supports also asks the operating system (XGETBV) whether it saves the registers.
bool is_supported(Isa isa) {
  if (!is_built(isa)) return false;
#ifdef PYLLM_X86_ISAS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
                      __builtin_cpu_supports("avx512bf16");
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avx512) return avx512;
#endif
  return true;
}

template <class Predicate>
std::vector<std::string> names_where(Predicate keep) {
  std::vector<std::string> names;
  for (int i = 0; i < static_cast<int>(kNames.size()); ++i) {
    if (keep(static_cast<Isa>(i))) names.emplace_back(kNames[i]);
  }
  return names;
}

Isa fastest() {
  if (is_supported(Isa::avx512)) return Isa::avx512;
  if (is_supported(Isa::avx2)) return Isa::avx2;
  return Isa::baseline;
}

std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{fastest()};
  return isa;
}

}  // namespace

std::vector<std::string> built_isas() { return names_where(is_built); }

std::vector<std::string> supported_isas() { return names_where(is_supported); }

void set_isa(const std::string& name) {
  if (name.empty()) {
    active() = fastest();
    return;
  }
  const std::vector<std::string> supported = supported_isas();
  if (std::find(supported.begin(), supported.end(), name) == supported.end()) {
    std::string expected;
    for (const std::string& one : supported) expected += (expected.empty() ? "" : ", ") + one;
    throw std::invalid_argument("PYLLM_ISA='" + name +
                                "' is not an instruction set that is built and supported on this "
                                "machine; expected one of: " +
                                expected);
  }
  const auto found = std::find(kNames.begin(), kNames.end(), name);
  active() = static_cast<Isa>(found - kNames.begin());
}

Isa active_isa() { return active(); }

std::string active_isa_name() { return kNames[static_cast<int>(active_isa())]; }

}  // namespace pyllm
