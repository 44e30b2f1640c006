/* Replays the golden vectors through the memory map, and through the decoder where weights are
   encoded, on the host or on the device: the array is intact, the map is consistent, and this
   compiler and processor round as the model needs it.
   Exit code 0 when everything holds, else 1. */
#include <stdio.h>

#include "golden.h"
#include "resq_check.h"
#include "weights.h"

#if RESQ_MODEL_ENCODED
#include "decode.h"

static int8_t codes[RESQ_MODEL_MOST_ELEMENTS];
#endif

static int failures = 0;

static void expect(int holds, const char *what, uint32_t index)
{
    if (!holds) {
        (void)printf("FAILED: %s (%lu)\n", what, (unsigned long)index);
        failures++;
    }
}

static void check_memory_map(void)
{
    uint32_t end = 0u;
    for (uint32_t i = 0u; i < RESQ_MODEL_N_TENSORS; i++) {
        const resq_model_tensor *tensor = &resq_model_tensors[i];
        expect(tensor->offset % RESQ_MODEL_ALIGNMENT == 0u, "alignment of tensor", i);
        expect(tensor->offset >= end, "order of tensor", i);
        expect(tensor->bytes == (tensor->elements * tensor->bits + 7u) / 8u, "size of tensor", i);
        for (uint32_t gap = end; gap < tensor->offset; gap++) {
            expect(resq_model_weights[gap] == 0u, "fill before tensor", i);
        }
#if RESQ_MODEL_ENCODED
        if (tensor->bits == 8u) {
            resq_model_decode(codes, &resq_model_weights[tensor->offset], tensor->elements,
                              tensor->channels);
            expect(resq_crc32((const uint8_t *)codes, tensor->elements) == tensor->codes_crc32,
                   "decoded codes of tensor", i);
        }
#endif
        end = tensor->offset + tensor->bytes;
        expect(end <= RESQ_MODEL_BYTES, "end of tensor", i);
    }
    expect((uintptr_t)resq_model_weights % RESQ_MODEL_ALIGNMENT == 0u, "alignment of array", 0u);
    const uint32_t damaged = resq_first_damaged_tensor();
    expect(damaged == RESQ_MODEL_N_TENSORS, "CRC-32 of tensor", damaged);
    expect(resq_crc32(resq_model_weights, RESQ_MODEL_BYTES) == RESQ_MODEL_CRC32,
           "CRC-32 of array", 0u);
}

static void check_roundings(void)
{
    for (uint32_t i = 0u; i < RESQ_GOLDEN_ROUNDINGS; i++) {
        const resq_golden_rounding *row = &resq_golden_roundings[i];
        expect(resq_quantize(row->value, row->scale, row->zero_point) == row->code, "rounding", i);
    }
}

static void check_outputs(void)
{
    for (uint32_t i = 0u; i < RESQ_GOLDEN_VECTORS; i++) {
        for (uint32_t k = 0u; k < RESQ_GOLDEN_CLASSES; k++) {
            const uint8_t code = resq_golden_code[i][k];
            const volatile float value =
                (float)((int32_t)code - RESQ_GOLDEN_ZERO_POINT) * RESQ_GOLDEN_SCALE;
            expect(value == resq_golden_output[i][k], "output of vector", i);
            expect(resq_quantize(value, RESQ_GOLDEN_SCALE, RESQ_GOLDEN_ZERO_POINT) == code,
                   "code of vector", i);
        }
    }
}

int main(void)
{
    check_memory_map();
    check_roundings();
    check_outputs();
    if (failures == 0) {
        (void)printf("%lu tensors, %lu bytes, %lu roundings, %lu vectors: ok\n",
                     (unsigned long)RESQ_MODEL_N_TENSORS, (unsigned long)RESQ_MODEL_BYTES,
                     (unsigned long)RESQ_GOLDEN_ROUNDINGS, (unsigned long)RESQ_GOLDEN_VECTORS);
    }
    return (failures == 0) ? 0 : 1;
}
