# Writes performer/_build_info.py into the build folder. The reason why there are no GPU kernels holds
# what a compiler said, in which nothing may end the Python string.
string(REPLACE "\\" "\\\\" performer_cuda_left_out_text "${performer_cuda_left_out}")
string(REPLACE "\"" "\\\"" performer_cuda_left_out_text "${performer_cuda_left_out_text}")
configure_file("${CMAKE_CURRENT_LIST_DIR}/build_info.py.in"
  "${CMAKE_CURRENT_BINARY_DIR}/performer/_build_info.py" @ONLY)
