# edl::edl: the operators of edl for a C++ program, with headers and libraries of the torch they were built for.
#
#   find_package(edl REQUIRED)
#   target_link_libraries(program PRIVATE edl::edl)
#
#   cmake -DCMAKE_PREFIX_PATH="$(python -c 'import edl; print(edl.cmake_prefix_path)')" ...
if(TARGET edl::edl)
  return()
endif()

get_filename_component(_edl_package "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
if(NOT EXISTS "${_edl_package}/lib/libedl.so")
  set(edl_FOUND FALSE)
  set(edl_NOT_FOUND_MESSAGE "edl is not built: run `pip install --no-build-isolation .` (looked for ${_edl_package}/lib/libedl.so)")
  return()
endif()

# torch: what the project found with find_package(Torch), else the libraries themselves, since TorchConfig.cmake of a CUDA
# build stops on machines without a CUDA toolkit.
if(NOT TARGET torch)
  string(REPLACE ":" ";" _edl_prefixes "$ENV{CMAKE_PREFIX_PATH}")
  foreach(_edl_prefix IN LISTS CMAKE_PREFIX_PATH _edl_prefixes ITEMS "${_edl_package}/../torch/share/cmake")
    if(EXISTS "${_edl_prefix}/Torch/TorchConfig.cmake")
      get_filename_component(_edl_torch "${_edl_prefix}/../.." ABSOLUTE)
      break()
    endif()
  endforeach()
  if(NOT _edl_torch)
    set(edl_FOUND FALSE)
    set(edl_NOT_FOUND_MESSAGE "edl needs torch: add torch.utils.cmake_prefix_path to CMAKE_PREFIX_PATH (got ${CMAKE_PREFIX_PATH})")
    return()
  endif()
endif()

add_library(edl::edl SHARED IMPORTED)
set_target_properties(edl::edl PROPERTIES
  IMPORTED_LOCATION "${_edl_package}/lib/libedl.so"
  INTERFACE_INCLUDE_DIRECTORIES "${_edl_package}/include"
  INTERFACE_COMPILE_FEATURES cxx_std_20)
if(TARGET torch)
  set_property(TARGET edl::edl APPEND PROPERTY INTERFACE_INCLUDE_DIRECTORIES ${TORCH_INCLUDE_DIRS})
  set_property(TARGET edl::edl APPEND PROPERTY INTERFACE_LINK_LIBRARIES ${TORCH_LIBRARIES})
else()
  set_property(TARGET edl::edl APPEND PROPERTY INTERFACE_INCLUDE_DIRECTORIES
    "${_edl_torch}/include" "${_edl_torch}/include/torch/csrc/api/include")
  # libtorch.so brings the CUDA libraries where there are any; nothing takes a symbol from it, so the linker must be told.
  set_property(TARGET edl::edl APPEND PROPERTY INTERFACE_LINK_LIBRARIES
    "-Wl,--no-as-needed,${_edl_torch}/lib/libtorch.so,--as-needed" "${_edl_torch}/lib/libtorch_cpu.so" "${_edl_torch}/lib/libc10.so")
endif()
set(edl_FOUND TRUE)
