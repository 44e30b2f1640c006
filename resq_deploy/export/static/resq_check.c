#include "resq_check.h"

#include "weights.h"

uint32_t resq_crc32(const uint8_t *bytes, uint32_t n)
{
    uint32_t crc = 0xffffffffu;
    for (uint32_t i = 0u; i < n; i++) {
        crc ^= bytes[i];
        for (int bit = 0; bit < 8; bit++) {
            crc = ((crc & 1u) != 0u) ? ((crc >> 1) ^ 0xedb88320u) : (crc >> 1);
        }
    }
    return ~crc;
}

uint32_t resq_first_damaged_tensor(void)
{
    uint32_t i = 0u;
    while (i < RESQ_MODEL_N_TENSORS) {
        const resq_model_tensor *tensor = &resq_model_tensors[i];
        if (resq_crc32(&resq_model_weights[tensor->offset], tensor->bytes) != tensor->crc32) {
            break;
        }
        i++;
    }
    return i;
}

uint8_t resq_quantize(float value, float scale, int32_t zero_point)
{
    const float steps = value / scale;
    int32_t code;
    if (!(steps > -512.0f)) { /* also what is not a number */
        code = 0;
    } else if (steps >= 512.0f) {
        code = 255;
    } else {
        int32_t whole = (int32_t)steps; /* towards zero */
        const float rest = steps - (float)whole;
        const int32_t odd = whole % 2;
        if ((rest > 0.5f) || ((rest == 0.5f) && (odd != 0))) {
            whole++;
        } else if ((rest < -0.5f) || ((rest == -0.5f) && (odd != 0))) {
            whole--;
        } else {
            /* nearest already */
        }
        code = whole + zero_point;
        if (code < 0) {
            code = 0;
        } else if (code > 255) {
            code = 255;
        } else {
            /* in range */
        }
    }
    return (uint8_t)code;
}
