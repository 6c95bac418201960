# Decides whether the part for XLA is built (performer/_xla.so and the handlers in performer/_ops.so),
# which jit_compile=True needs and nothing else. PERFORMER_XLA=OFF leaves it out; so does a TensorFlow
# that comes without what it is made of. Sets PERFORMER_HAS_XLA, True or False for Python.
set(PERFORMER_HAS_XLA False)
if(NOT PERFORMER_XLA)
  message(STATUS "XLA: off (PERFORMER_XLA=OFF); jit_compile=True will not work")
  return()
endif()
foreach(file include/tensorflow/compiler/tf2xla/xla_op_kernel.h include/xla/ffi/api/ffi.h
    libtensorflow_cc.so.2)
  if(NOT EXISTS ${tensorflow_dir}/${file})
    message(STATUS "XLA: off, as this TensorFlow has no ${file}; jit_compile=True will not work")
    return()
  endif()
endforeach()
set(PERFORMER_HAS_XLA True)
message(STATUS "XLA: on")
