# Decides whether the CUDA kernels are built, and with which nvcc. PERFORMER_CUDA, a CMake option or,
# where that is not given, an environment variable:
#
#   AUTO  (default) built where the machine has an NVIDIA GPU, or a compiler is named, and the system
#         has an nvcc that can build them: to compile them takes most of the time of a build
#   ON    built; nvcc from the system or else from the wheels of tools/cuda-requirements.txt, and an
#         error where neither is there
#   OFF   not built
#
# The system's nvcc is what CMAKE_CUDA_COMPILER or CUDACXX names, or system_nvcc; the wheels' is
# wheels_nvcc. cmake/locate.py searches for both.
#
# Sets performer_cuda_enabled; where enabled, cuda_include, cuda_runtime (the static library) and, for
# messages, performer_cuda_compiler and performer_cuda_targets; otherwise performer_cuda_left_out, the
# reason. Nothing of the driver is needed to build or to load.
set(performer_cuda_enabled OFF)

# Files that the driver of a GPU brings; the last is that of WSL.
if(NOT DEFINED performer_gpu_signs)
  set(performer_gpu_signs /proc/driver/nvidia/version /dev/nvidiactl /dev/dxg)
endif()

# sm_80 code runs on sm_86 and sm_89 too; later GPUs compile the PTX of the last entry.
set(CMAKE_CUDA_ARCHITECTURES "80-real;90" CACHE STRING "GPU architectures, as CMake writes them")

if("${PERFORMER_CUDA}" STREQUAL "")
  set(PERFORMER_CUDA AUTO)
  if(NOT "$ENV{PERFORMER_CUDA}" STREQUAL "")
    set(PERFORMER_CUDA "$ENV{PERFORMER_CUDA}")
  endif()
endif()
string(TOUPPER "${PERFORMER_CUDA}" performer_cuda_wish)
if(performer_cuda_wish MATCHES "^(1|YES|TRUE)$")
  set(performer_cuda_wish ON)
elseif(performer_cuda_wish MATCHES "^(0|NO|FALSE)$")
  set(performer_cuda_wish OFF)
elseif(NOT performer_cuda_wish MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "PERFORMER_CUDA must be AUTO, ON or OFF; got ${PERFORMER_CUDA}")
endif()

# Leaves the reason why there will be no kernels; an error where they were asked for.
function(performer_without_cuda reason)
  if(performer_cuda_wish STREQUAL "ON")
    message(FATAL_ERROR "PERFORMER_CUDA=ON: ${reason}")
  endif()
  set(performer_cuda_left_out "${reason}" PARENT_SCOPE)
endfunction()

# Sets performer_nvcc, and performer_nvcc_origin: where it comes from. CMAKE_CUDA_COMPILER is the
# caller's: what CMake itself writes there is dropped below, as it may not exist when CMake runs
# again.
function(performer_find_nvcc)
  set(origin "system")
  set(named "${CMAKE_CUDA_COMPILER}")
  if(NOT named)
    set(named "$ENV{CUDACXX}")
  endif()
  if(named)
    find_program(nvcc NAMES "${named}" NO_CACHE)
  elseif(system_nvcc)
    set(nvcc "${system_nvcc}")
  elseif(performer_cuda_wish STREQUAL "ON")
    set(nvcc "${wheels_nvcc}")
    set(origin "PyPI wheels")
  endif()
  set(performer_nvcc "${nvcc}" PARENT_SCOPE)
  set(performer_nvcc_origin "${origin}" PARENT_SCOPE)
endfunction()

# Sets performer_gpu_is_here.
function(performer_find_gpu)
  set(performer_gpu_is_here OFF PARENT_SCOPE)
  foreach(sign IN LISTS performer_gpu_signs)
    if(EXISTS "${sign}")
      set(performer_gpu_is_here ON PARENT_SCOPE)
    endif()
  endforeach()
endfunction()

performer_find_gpu()
if(CMAKE_CUDA_COMPILER OR NOT "$ENV{CUDACXX}" STREQUAL "")
  set(performer_nvcc_is_named ON)
else()
  set(performer_nvcc_is_named OFF)
endif()

if(performer_cuda_wish STREQUAL "OFF")
  performer_without_cuda("switched off (PERFORMER_CUDA)")
elseif(performer_cuda_wish STREQUAL "AUTO" AND NOT performer_gpu_is_here AND NOT performer_nvcc_is_named)
  performer_without_cuda("no NVIDIA GPU is here; PERFORMER_CUDA=ON builds them for other machines")
elseif(PERFORMER_EMULATION OR PERFORMER_SANITIZE)
  performer_without_cuda("this build is for the emulator or for sanitizers")
else()
  performer_find_nvcc()
  if(NOT performer_nvcc)
    performer_without_cuda(
      "no nvcc found. Install the CUDA toolkit or name its compiler (CUDACXX), or build with \
PERFORMER_CUDA=ON and the wheels of tools/cuda-requirements.txt (`pip install .` fetches them).")
  else()
    execute_process(COMMAND "${performer_nvcc}" --version
      OUTPUT_VARIABLE performer_nvcc_version ERROR_QUIET)
    string(REGEX MATCH "release [0-9]+\\.[0-9]+, V([0-9.]+)" performer_nvcc_version
      "${performer_nvcc_version}")
    set(performer_nvcc_version "${CMAKE_MATCH_1}")
    if(NOT performer_nvcc_version)
      set(performer_nvcc_version "of no version that it tells")
    endif()
    get_filename_component(cuda_root "${performer_nvcc}" REALPATH)
    # A script that calls the compiler elsewhere says where with --dryrun.
    execute_process(COMMAND "${performer_nvcc}" --dryrun -c -x cu /dev/null -o /dev/null
      ERROR_VARIABLE dryrun OUTPUT_QUIET RESULT_VARIABLE nvcc_result)
    if(dryrun MATCHES "_HERE_=([^\n]+)/bin\n")
      set(cuda_root "${CMAKE_MATCH_1}")
    endif()
    find_library(cuda_runtime NAMES cudart_static NO_CACHE NO_DEFAULT_PATH
      PATHS "${cuda_root}" PATH_SUFFIXES lib64 lib targets/x86_64-linux/lib targets/sbsa-linux/lib)
    if(NOT cuda_runtime)
      find_library(cuda_runtime NAMES cudart_static NO_CACHE)  # a distribution's own package
    endif()
    find_path(cuda_include NAMES cuda_runtime_api.h NO_CACHE
      PATHS "${cuda_root}" PATH_SUFFIXES include targets/x86_64-linux/include
      targets/sbsa-linux/include)
    if(NOT nvcc_result EQUAL 0)
      performer_without_cuda("${performer_nvcc} does not run: ${dryrun}")
    elseif(performer_nvcc_version VERSION_LESS 11.8)
      performer_without_cuda(
        "nvcc must be 11.8 or later; ${performer_nvcc} is ${performer_nvcc_version}")
    elseif(NOT cuda_runtime OR NOT cuda_include)
      performer_without_cuda(
        "libcudart_static.a or cuda_runtime_api.h not found beside ${performer_nvcc}")
    else()
      # CMake links its trials against libcudart_static.a, which the wheels' nvcc looks for in lib64.
      get_filename_component(cuda_library_folder "${cuda_runtime}" DIRECTORY)
      set(ENV{LIBRARY_PATH} "${cuda_library_folder}:$ENV{LIBRARY_PATH}")
      set(performer_nvcc_given "$CACHE{CMAKE_CUDA_COMPILER}")
      # What CMake learned of another nvcc, which may be gone.
      set(performer_nvcc_known "${CMAKE_PLATFORM_INFO_DIR}/CMakeCUDACompiler.cmake")
      if(EXISTS "${performer_nvcc_known}")
        file(STRINGS "${performer_nvcc_known}" line REGEX "^set\\(CMAKE_CUDA_COMPILER \"")
        if(NOT line STREQUAL "set(CMAKE_CUDA_COMPILER \"${performer_nvcc}\")")
          file(REMOVE "${performer_nvcc_known}")
        endif()
      endif()
      set(performer_nvcc_compiles ON)
      if(NOT EXISTS "${performer_nvcc_known}")
        # In a project of its own: a failure ends nothing here. That project gets everything by the
        # environment, and nothing is tried where the variable is set.
        set(ENV{CUDACXX} "${performer_nvcc}")
        set(ENV{CUDAARCHS} "${CMAKE_CUDA_ARCHITECTURES}")
        if(CMAKE_CUDA_HOST_COMPILER)
          set(ENV{CUDAHOSTCXX} "${CMAKE_CUDA_HOST_COMPILER}")
        endif()
        if(CMAKE_CUDA_FLAGS)
          set(ENV{CUDAFLAGS} "${CMAKE_CUDA_FLAGS}")
        endif()
        unset(CMAKE_CUDA_COMPILER)
        unset(CMAKE_CUDA_COMPILER CACHE)
        include(CheckLanguage)
        check_language(CUDA)
        if(NOT CMAKE_CUDA_COMPILER)
          set(performer_nvcc_compiles OFF)
        endif()
      endif()
      if(performer_nvcc_compiles)
        set(CMAKE_CUDA_COMPILER "${performer_nvcc}")
        enable_language(CUDA)
        set(performer_cuda_enabled ON)
        set(performer_cuda_compiler "nvcc ${performer_nvcc_version} (${performer_nvcc_origin})")
      else()
        performer_without_cuda("${performer_nvcc} cannot compile and link a program here")
      endif()
      unset(CMAKE_CUDA_COMPILER CACHE)
      if(performer_nvcc_given)
        set(CMAKE_CUDA_COMPILER "${performer_nvcc_given}" CACHE FILEPATH "CUDA compiler")
      endif()
    endif()
  endif()
endif()

if(performer_cuda_enabled)
  set(performer_cuda_targets "")
  foreach(architecture IN LISTS CMAKE_CUDA_ARCHITECTURES)  # "80": code and PTX, "80-real": code
    string(REGEX MATCH "^[0-9]+[a-z]?" number "${architecture}")
    if(NOT architecture MATCHES "-virtual$")
      list(APPEND performer_cuda_targets sm_${number})
    endif()
    if(NOT architecture MATCHES "-real$")
      list(APPEND performer_cuda_targets compute_${number})
    endif()
  endforeach()
  list(JOIN performer_cuda_targets " " performer_cuda_targets)
  message(STATUS "CUDA kernels: built with ${performer_cuda_compiler} for ${performer_cuda_targets}")
  message(STATUS "  ${performer_nvcc}, ${cuda_runtime}")
else()
  message(STATUS "CUDA kernels: left out; ${performer_cuda_left_out}")
endif()
