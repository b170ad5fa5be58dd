/* Fingerprints of runs of bytes, as docs/format.md defines them and summing.py has them in numpy.

   No state and no Python: it is loaded as a plain library, by compiled.py, and called without the interpreter's
   lock. `low` and `high` are the halves of the weights A. Little-endian machines only. */

#include <stdint.h>
#include <string.h>

#define BLOCK 4096u /* words that share one B */
#define ABREAST 4 /* blocks at most that are summed side by side: the weights A, which all share, are fetched once */

#ifndef WIDEST /* words at a time; tests build narrower ones, for processors that they do not run on */
#define WIDEST 16
#endif

#if WIDEST > 1 && defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAS_WIDE_VERSIONS 1
#define AHEAD_BYTES 2048 /* fetched early: memory that is in no cache yet would be waited for */
#endif

/* Sum words of one block times A. Of w * (low + 2^32 high) modulo 2^64 the upper product needs but 32 bits. */
static uint64_t dot_plain(const unsigned char *data, const uint32_t *low, const uint32_t *high, uint64_t num_words)
{
    uint64_t lower = 0;
    uint32_t upper = 0;
    for (uint64_t i = 0; i < num_words; i++) {
        uint32_t word;
        memcpy(&word, data + 4 * i, 4); /* it may lie anywhere */
        lower += (uint64_t)word * low[i];
        upper += word * high[i];
    }
    return lower + ((uint64_t)upper << 32);
}

#ifdef HAS_WIDE_VERSIONS
/* The same of words that begin at several places, 8 or 16 at a time and a multiple of that: `num_places` of them,
   each a block behind the one before. Words at even and at odd places have products of their own. */
__attribute__((target("avx2"), always_inline))
static inline void dots_of_8(const unsigned char *data, const uint32_t *low, const uint32_t *high, uint64_t num_words,
                             int num_places, uint64_t *dots)
{
    __m256i even[ABREAST], odd[ABREAST], upper[ABREAST];
    for (int k = 0; k < num_places; k++)
        even[k] = odd[k] = upper[k] = _mm256_setzero_si256();
    for (uint64_t i = 0; i < num_words; i += 8) {
        __m256i l = _mm256_loadu_si256((const __m256i *)(low + i)), next = _mm256_srli_epi64(l, 32);
        __m256i h = _mm256_loadu_si256((const __m256i *)(high + i));
        for (int k = 0; k < num_places; k++) {
            const unsigned char *place = data + 4 * (i + (uint64_t)k * BLOCK);
            __builtin_prefetch(place + AHEAD_BYTES);
            __m256i w = _mm256_loadu_si256((const __m256i *)place);
            even[k] = _mm256_add_epi64(even[k], _mm256_mul_epu32(w, l));
            odd[k] = _mm256_add_epi64(odd[k], _mm256_mul_epu32(_mm256_srli_epi64(w, 32), next));
            upper[k] = _mm256_add_epi32(upper[k], _mm256_mullo_epi32(w, h));
        }
    }
    for (int k = 0; k < num_places; k++) {
        uint64_t lanes[4];
        __m256i sum = _mm256_add_epi64(even[k], odd[k]);
        sum = _mm256_add_epi64(sum, _mm256_slli_epi64(upper[k], 32));
        sum = _mm256_add_epi64(sum, _mm256_slli_epi64(_mm256_srli_epi64(upper[k], 32), 32));
        _mm256_storeu_si256((__m256i *)lanes, sum);
        dots[k] = lanes[0] + lanes[1] + lanes[2] + lanes[3];
    }
}

__attribute__((target("avx512f"), always_inline))
static inline void dots_of_16(const unsigned char *data, const uint32_t *low, const uint32_t *high, uint64_t num_words,
                              int num_places, uint64_t *dots)
{
    __m512i even[ABREAST], odd[ABREAST], upper[ABREAST];
    for (int k = 0; k < num_places; k++)
        even[k] = odd[k] = upper[k] = _mm512_setzero_si512();
    for (uint64_t i = 0; i < num_words; i += 16) {
        __m512i l = _mm512_loadu_si512(low + i), next = _mm512_srli_epi64(l, 32);
        __m512i h = _mm512_loadu_si512(high + i);
        for (int k = 0; k < num_places; k++) {
            const unsigned char *place = data + 4 * (i + (uint64_t)k * BLOCK);
            __builtin_prefetch(place + AHEAD_BYTES);
            __m512i w = _mm512_loadu_si512(place);
            even[k] = _mm512_add_epi64(even[k], _mm512_mul_epu32(w, l));
            odd[k] = _mm512_add_epi64(odd[k], _mm512_mul_epu32(_mm512_srli_epi64(w, 32), next));
            upper[k] = _mm512_add_epi32(upper[k], _mm512_mullo_epi32(w, h));
        }
    }
    for (int k = 0; k < num_places; k++) {
        __m512i sum = _mm512_add_epi64(even[k], odd[k]);
        sum = _mm512_add_epi64(sum, _mm512_slli_epi64(upper[k], 32));
        sum = _mm512_add_epi64(sum, _mm512_slli_epi64(_mm512_srli_epi64(upper[k], 32), 32));
        dots[k] = (uint64_t)_mm512_reduce_add_epi64(sum);
    }
}

__attribute__((target("avx2")))
static uint64_t dot_of_8(const unsigned char *data, const uint32_t *low, const uint32_t *high, uint64_t num_words)
{
    uint64_t dot;
    dots_of_8(data, low, high, num_words, 1, &dot);
    return dot;
}

__attribute__((target("avx512f")))
static uint64_t dot_of_16(const unsigned char *data, const uint32_t *low, const uint32_t *high, uint64_t num_words)
{
    uint64_t dot;
    dots_of_16(data, low, high, num_words, 1, &dot);
    return dot;
}

/* Sum whole blocks, as many as there are registers for; return how many. */
__attribute__((target("avx2")))
static uint64_t blocks_of_8(const unsigned char *data, const uint32_t *low, const uint32_t *high, uint64_t *dots)
{
    dots_of_8(data, low, high, BLOCK, 2, dots);
    return 2;
}

__attribute__((target("avx512f")))
static uint64_t blocks_of_16(const unsigned char *data, const uint32_t *low, const uint32_t *high, uint64_t *dots)
{
    dots_of_16(data, low, high, BLOCK, ABREAST, dots);
    return ABREAST;
}
#endif

static uint64_t dot(const unsigned char *data, const uint32_t *low, const uint32_t *high, uint64_t num_words)
{
    uint64_t total = 0, wide = 0;
#ifdef HAS_WIDE_VERSIONS
    if (WIDEST >= 16 && num_words >= 16 && __builtin_cpu_supports("avx512f"))
        total = dot_of_16(data, low, high, wide = num_words & ~15ull);
    else if (num_words >= 8 && __builtin_cpu_supports("avx2"))
        total = dot_of_8(data, low, high, wide = num_words & ~7ull);
#endif
    return total + dot_plain(data + 4 * wide, low + wide, high + wide, num_words - wide);
}

/* Sum words times A of the first of some whole blocks that lie side by side, each in a sum of its own; return how
   many blocks were: none where one at a time is as good. */
static uint64_t dot_blocks(const unsigned char *data, const uint32_t *low, const uint32_t *high, uint64_t num_blocks,
                           uint64_t *dots)
{
#ifdef HAS_WIDE_VERSIONS
    if (WIDEST >= 16 && num_blocks >= ABREAST && __builtin_cpu_supports("avx512f"))
        return blocks_of_16(data, low, high, dots);
    if (num_blocks >= 2 && __builtin_cpu_supports("avx2"))
        return blocks_of_8(data, low, high, dots);
#endif
    return (void)data, (void)low, (void)high, (void)num_blocks, (void)dots, 0;
}

static uint64_t weight_of_block(uint64_t number)
{
    uint64_t z = number + 0x636865636B707431u + 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (z ^ (z >> 31)) | 1;
}

/* Sum bytes of one word, which begin with byte number `first` of the tensor. */
static uint64_t part_of_word(const unsigned char *data, uint64_t num_bytes, uint64_t first, const uint32_t *low,
                             const uint32_t *high)
{
    unsigned char word[4] = {0, 0, 0, 0};
    uint64_t place = first / 4;
    memcpy(word + first % 4, data, num_bytes);
    return dot(word, low + place % BLOCK, high + place % BLOCK, 1) * weight_of_block(place / BLOCK);
}

/* Return the fingerprint of bytes that lie side by side in their tensor, from its byte number `first` on. */
uint64_t holdfast_sum_run(const unsigned char *data, uint64_t num_bytes, uint64_t first, const uint32_t *low,
                          const uint32_t *high)
{
    uint64_t total = 0, head = -first % 4;
    if (head) {
        head = head < num_bytes ? head : num_bytes;
        total += part_of_word(data, head, first, low, high);
        data += head, num_bytes -= head, first += head;
    }
    while (num_bytes >= 4) {
        uint64_t place = first / 4, block = place / BLOCK, room = BLOCK - place % BLOCK, num_words = num_bytes / 4;
        uint64_t dots[ABREAST] = {0};
        uint64_t num_blocks = room == BLOCK ? dot_blocks(data, low, high, num_words / BLOCK, dots) : 0;
        for (uint64_t k = 0; k < num_blocks; k++)
            total += dots[k] * weight_of_block(block + k);
        if (num_blocks)
            num_words = num_blocks * BLOCK;
        else {
            num_words = num_words < room ? num_words : room;
            total += dot(data, low + place % BLOCK, high + place % BLOCK, num_words) * weight_of_block(block);
        }
        data += 4 * num_words, num_bytes -= 4 * num_words, first += 4 * num_words;
    }
    if (num_bytes)
        total += part_of_word(data, num_bytes, first, low, high);
    return total;
}

/* Do the same for rows that lie side by side in memory; each begins at a byte of the tensor of its own. */
void holdfast_sum_rows(const unsigned char *data, uint64_t num_rows, uint64_t row_bytes, const uint64_t *firsts,
                       const uint32_t *low, const uint32_t *high, uint64_t *sums)
{
    for (uint64_t row = 0; row < num_rows; row++)
        sums[row] = holdfast_sum_run(data + row * row_bytes, row_bytes, firsts[row], low, high);
}
