/* What a device does at start: look whether the stored model is intact before it is used. */
#include <stdio.h>

#include "resq_check.h"
#include "weights.h"

int main(void)
{
    for (uint32_t i = 0u; i < RESQ_MODEL_N_TENSORS; i++) {
        const resq_model_tensor *tensor = &resq_model_tensors[i];
        (void)printf("0x%06lx %8lu bytes  crc32 %08lx  %s\n", (unsigned long)tensor->offset,
                     (unsigned long)tensor->bytes, (unsigned long)tensor->crc32, tensor->name);
    }
    const uint32_t damaged = resq_first_damaged_tensor();
    if (damaged < RESQ_MODEL_N_TENSORS) {
        (void)printf("damaged: %s\n", resq_model_tensors[damaged].name);
        return 1;
    }
    (void)printf("%lu bytes intact\n", (unsigned long)RESQ_MODEL_BYTES);
    return 0;
}
