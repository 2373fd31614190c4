# Target cuda_gate: nvcc alone, no CUDA torch and no GPU. Compiles the kernels for every architecture that we name as
# supported, with warnings and register spills as errors, into cuda_gate/sm_*.cubin of the build folder.
set(TORCHTOWER_GATE_ARCHITECTURES 75 80 86 89 90 100 120)

# Not enable_language(CUDA), which would add its compiler checks to every build that needs no CUDA.
if(DEFINED ENV{CUDACXX})
  set(TORCHTOWER_NVCC $ENV{CUDACXX} CACHE FILEPATH "The CUDA compiler of the gate")
endif()
find_program(TORCHTOWER_NVCC nvcc DOC "The CUDA compiler of the gate")
mark_as_advanced(TORCHTOWER_NVCC)
set(_cubins)
foreach(_architecture IN LISTS TORCHTOWER_GATE_ARCHITECTURES)
  set(_cubin ${CMAKE_CURRENT_BINARY_DIR}/cuda_gate/sm_${_architecture}.cubin)
  list(APPEND _cubins ${_cubin})
  add_custom_command(
    OUTPUT ${_cubin}
    COMMAND ${CMAKE_COMMAND} -E make_directory ${CMAKE_CURRENT_BINARY_DIR}/cuda_gate
    COMMAND ${TORCHTOWER_NVCC} -std=c++17 -O3 -I${CMAKE_CURRENT_LIST_DIR}/.. -arch=sm_${_architecture} -cubin
            -Werror=all-warnings -Xptxas=-warn-spills,-warn-lmem-usage,-Werror
            -MD -MF ${_cubin}.d -MT ${_cubin} -o ${_cubin} ${CMAKE_CURRENT_LIST_DIR}/tower_mean.cu
    DEPENDS ${CMAKE_CURRENT_LIST_DIR}/tower_mean.cu
    DEPFILE ${_cubin}.d
    COMMENT "Gate: kernels for sm_${_architecture}, spills are errors"
    VERBATIM)
endforeach()
if(TORCHTOWER_NVCC)
  add_custom_target(cuda_gate DEPENDS ${_cubins})
else()
  add_custom_target(cuda_gate
    COMMAND ${CMAKE_COMMAND} -E echo "cuda_gate: expected nvcc on PATH, in CUDACXX or in CUDA_HOME, but found none"
    COMMAND ${CMAKE_COMMAND} -E false)
endif()
