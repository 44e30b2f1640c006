/* Checks of the stored model, for a boot or background test. C99, no allocation, no library calls. */
#ifndef RESQ_CHECK_H
#define RESQ_CHECK_H

#include <stdint.h>

/* CRC-32 (IEEE 802.3, reflected, as zlib computes it) of n bytes. */
uint32_t resq_crc32(const uint8_t *bytes, uint32_t n);

/* Index of the first tensor whose bytes do not have the CRC-32 of the memory map;
   RESQ_MODEL_N_TENSORS when all of them do. */
uint32_t resq_first_damaged_tensor(void);

/* ONNX QuantizeLinear to uint8: saturate(round(value / scale) + zero_point), ties to even. */
uint8_t resq_quantize(float value, float scale, int32_t zero_point);

#endif
