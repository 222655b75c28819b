# cmake -DNM=nm -DOUTPUT=file.cpp "-DOBJECTS=a.o;b.o" -P weak_symbols.cmake
#
# Writes C++ that knows the weak symbols of the kernels' objects. There must be none: the linker
# keeps one copy of those, of any instruction set. tests/test_build.py looks.
set(found)
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} -C ${object} OUTPUT_VARIABLE symbols RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "${NM} ${object}: ${failed}")
  endif()
  string(REGEX MATCHALL "[^\n]* [VWuvw] [^\n]*" weak "${symbols}")
  foreach(line IN LISTS weak)
    string(APPEND found "${object}: ${line}\n")
  endforeach()
endforeach()
string(LENGTH "${OBJECTS}" length)
if(length EQUAL 0)
  message(FATAL_ERROR "no objects were named")
endif()
file(WRITE ${OUTPUT} "#include \"cpu/weak_symbols.h\"\n\n"
     "const char* pyllm::weak_symbols() { return R\"symbols(${found})symbols\"; }\n")
