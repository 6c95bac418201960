# The TensorFlow ops, for each version of TensorFlow in tensorflow_dirs. All of them link the same
# kernels. Sets PERFORMER_TENSORFLOW_VERSIONS and PERFORMER_HAS_XLA.
#
# For one version they are performer/_ops.so and performer/_xla.so, and hold all kernels. For several,
# each has a folder, performer/tensorflow-MINOR, of which performer/loader.py takes the one it needs;
# the CUDA kernels are then a library of their own, performer/libperformer_cuda.so, which the system's
# loader finds beside that folder, or beside a copy of _ops.so.
if(NOT tensorflow_dirs)
  message(FATAL_ERROR
    "TensorFlow is not installed for ${Python_EXECUTABLE}, and the ops are compiled against its headers. "
    "Install tensorflow, or build with -DPERFORMER_TENSORFLOW=OFF.")
endif()

# A library that TensorFlow loads: `name` of the file and its sources.
function(add_tensorflow_library target name)
  add_library(${target} MODULE ${ARGN})
  set_target_properties(${target} PROPERTIES OUTPUT_NAME ${name} PREFIX "" SUFFIX .so
    LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/${destination})
  target_include_directories(${target} SYSTEM PRIVATE ${tensorflow_dir}/include)
  # As TensorFlow's own wheel was compiled (tf.sysconfig.get_compile_flags()).
  target_compile_definitions(${target} PRIVATE
    _GLIBCXX_USE_CXX11_ABI=1 EIGEN_MAX_ALIGN_BYTES=64 NDEBUG)
  target_link_directories(${target} PRIVATE ${tensorflow_dir})
  target_link_options(${target} PRIVATE
    -Wl,--no-undefined -Wl,--exclude-libs,ALL -Wl,--version-script=${PROJECT_SOURCE_DIR}/cmake/exports.map)
  if("undefined" IN_LIST PERFORMER_SANITIZE)
    # TensorFlow's headers break these rules themselves.
    target_compile_options(${target} PRIVATE
      -fno-sanitize=vptr,null,nonnull-attribute,returns-nonnull-attribute)
  endif()
  install(TARGETS ${target} LIBRARY DESTINATION ${destination})
endfunction()

list(LENGTH tensorflow_dirs performer_number_of_tensorflows)
foreach(tensorflow_dir IN LISTS tensorflow_dirs)
  execute_process(
    COMMAND ${Python_EXECUTABLE} ${PROJECT_SOURCE_DIR}/cmake/locate.py ${tensorflow_dir}
    OUTPUT_VARIABLE tensorflow_version OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  message(STATUS "TensorFlow ${tensorflow_version}: ${tensorflow_dir}")
  list(APPEND PERFORMER_TENSORFLOW_VERSIONS ${tensorflow_version})
  set(destination performer)
  set(of "")
  if(performer_number_of_tensorflows GREATER 1)
    string(REGEX MATCH "^[0-9]+\\.[0-9]+" minor "${tensorflow_version}")
    set(destination performer/tensorflow-${minor})
    set(of "_${minor}")
  endif()

  # First, as the lowering takes half a minute to compile and other files are compiled beside it.
  include(cmake/xla.cmake)
  if(PERFORMER_HAS_XLA)
    add_tensorflow_library(performer_xla${of} _xla cc/tf/xla/lowering.cc)
    target_include_directories(performer_xla${of} SYSTEM PRIVATE
      ${tensorflow_dir}/include/external/highwayhash
      ${tensorflow_dir}/include/external/farmhash_archive/src)
    target_link_libraries(performer_xla${of} PRIVATE
      performer_core -l:libtensorflow_cc.so.2 -l:libtensorflow_framework.so.2)
    file(GLOB xla_handlers CONFIGURE_DEPENDS cc/tf/xla/*_handlers.cc)
  else()
    set(xla_handlers "")
  endif()

  file(GLOB tf_sources CONFIGURE_DEPENDS cc/tf/*.cc)
  add_tensorflow_library(performer_ops${of} _ops ${tf_sources} ${xla_handlers})
  target_link_libraries(performer_ops${of} PRIVATE
    ${performer_kernels} -l:libtensorflow_framework.so.2)
  if(performer_shares_cuda)
    target_link_options(performer_ops${of} PRIVATE "LINKER:-rpath,$ORIGIN/..:$ORIGIN")
  endif()
endforeach()
list(JOIN PERFORMER_TENSORFLOW_VERSIONS " " PERFORMER_TENSORFLOW_VERSIONS)
