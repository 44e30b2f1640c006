# find_package(resq_model CONFIG): compiles the bundle that this file lies in, with the options and
# the language standard of the project that includes it. Needs the language C.
#
#   resq_model::weights   the stored tensors and their table (weights.h)
#   resq_model::check     CRC-32 and rounding (resq_check.h), and where weights are encoded their
#                         decoder (decode.h); brings resq_model::weights
#   resq_model::golden    the golden vectors (golden.h), for tests
#   resq_model_add_test(NAME)  a test that replays the golden vectors
#   resq_model_FILES      folder of this bundle: the models, manifest.json, memory_map.json

get_filename_component(resq_model_FILES "${CMAKE_CURRENT_LIST_FILE}" DIRECTORY)

if(NOT TARGET resq_model::weights)
  foreach(part weights check golden)
    set(sources "${resq_model_FILES}/${part}.c")
    if(part STREQUAL "check")
      set(sources "${resq_model_FILES}/resq_check.c")
      if(EXISTS "${resq_model_FILES}/decode.c") # only where weights are encoded
        list(APPEND sources "${resq_model_FILES}/decode.c")
      endif()
    endif()
    add_library(resq_model_${part} STATIC EXCLUDE_FROM_ALL ${sources})
    add_library(resq_model::${part} ALIAS resq_model_${part})
    target_include_directories(resq_model_${part} PUBLIC "${resq_model_FILES}")
  endforeach()
  target_link_libraries(resq_model_check PUBLIC resq_model_weights)
  if(UNIX)
    target_link_libraries(resq_model_check PUBLIC m) # decode.c may round
  endif()
endif()

function(resq_model_add_test name)
  add_executable(${name} "${resq_model_FILES}/resq_replay.c")
  target_link_libraries(${name} PRIVATE resq_model::check resq_model::golden)
  add_test(NAME ${name} COMMAND ${name})
endfunction()
