# Decides for which instruction sets the CPU kernels are compiled; the best that the processor has is
# chosen when they run. PERFORMER_ISAS, a CMake option or, where that is not given, an environment
# variable:
#
#   ALL     (default) all that the compiler knows for this kind of processor
#   NATIVE  the best one of this machine alone, for libraries that stay here
#   v2,v3   names, separated by commas; NATIVE may be one of them
#
# Sets performer_isas and, for each, performer_isa_flags_NAME.
include(CheckCXXCompilerFlag)

if("${PERFORMER_ISAS}" STREQUAL "")
  set(PERFORMER_ISAS ALL)
  if(NOT "$ENV{PERFORMER_ISAS}" STREQUAL "")
    set(PERFORMER_ISAS "$ENV{PERFORMER_ISAS}")
  endif()
endif()

set(performer_isas "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  set(performer_isa_flags_v2 -march=x86-64-v2)
  set(performer_isa_flags_v3 -march=x86-64-v3)
  set(performer_isa_flags_v4 -march=x86-64-v4)
  set(performer_isa_flags_v4bf16 -march=x86-64-v4 -mavx512bf16)
  foreach(isa v2 v3 v4 v4bf16)
    check_cxx_compiler_flag("${performer_isa_flags_${isa}}" PERFORMER_COMPILES_${isa})
    if(PERFORMER_COMPILES_${isa})
      list(APPEND performer_isas ${isa})
    endif()
  endforeach()
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  set(performer_isas neon)
endif()
if(NOT performer_isas)
  set(performer_isas generic)
endif()

string(REPLACE "," ";" performer_isas_named "${PERFORMER_ISAS}")
if("NATIVE" IN_LIST performer_isas_named)
  if(CMAKE_CROSSCOMPILING)
    message(FATAL_ERROR "PERFORMER_ISAS=NATIVE asks this machine's processor, and this is a build for another one.")
  endif()
  try_run(performer_native_ran performer_native_compiles
    ${PROJECT_BINARY_DIR}/native ${PROJECT_SOURCE_DIR}/cmake/native_isa.cc
    CMAKE_FLAGS "-DINCLUDE_DIRECTORIES=${PROJECT_SOURCE_DIR}/cc"
    RUN_OUTPUT_VARIABLE performer_native_isas)
  # The best is the last that both the compiler and the processor know.
  set(performer_native_isa "")
  foreach(isa IN LISTS performer_isas)
    if(isa IN_LIST performer_native_isas)
      set(performer_native_isa ${isa})
    endif()
  endforeach()
  if(NOT performer_native_isa)
    message(FATAL_ERROR "PERFORMER_ISAS=NATIVE: this processor has no instruction set that there are kernels for.")
  endif()
  list(TRANSFORM performer_isas_named REPLACE "^NATIVE$" "${performer_native_isa}")
  list(REMOVE_DUPLICATES performer_isas_named)
endif()
if(NOT performer_isas_named STREQUAL "ALL")
  foreach(isa IN LISTS performer_isas_named)
    if(NOT isa IN_LIST performer_isas)
      list(JOIN performer_isas ", " performer_isas_known)
      message(FATAL_ERROR "PERFORMER_ISAS must be ALL, or NATIVE and names of ${performer_isas_known} (those "
        "that this compiler knows), separated by commas; got ${PERFORMER_ISAS}")
    endif()
  endforeach()
  set(performer_isas ${performer_isas_named})
endif()
list(JOIN performer_isas ", " performer_isas_text)
message(STATUS "CPU kernels: ${performer_isas_text}")
