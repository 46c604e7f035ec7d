// What Python's `import` asks of a library: a module, here an empty one. Loading it registers the operators of csrc/.
// kernel-builder names the library, the module and the namespace of the operators alike: TORCH_EXTENSION_NAME.
#include <Python.h>

#define KLDIV_INIT_OF(name) PyInit_##name
#define KLDIV_INIT(name) KLDIV_INIT_OF(name)
#define KLDIV_TEXT_OF(name) #name
#define KLDIV_TEXT(name) KLDIV_TEXT_OF(name)

PyMODINIT_FUNC KLDIV_INIT(TORCH_EXTENSION_NAME)() {
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, KLDIV_TEXT(TORCH_EXTENSION_NAME), nullptr, 0};
    return PyModule_Create(&module);
}
