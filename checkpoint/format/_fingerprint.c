/* Fingerprints of runs of bytes, as docs/format.md defines them and summing.py has them in numpy.

   No state and no Python: it is loaded as a plain library, by compiled.py, and called without the interpreter's
   lock. `low` and `high` are the halves of the weights A. Little-endian machines only. */

#include <stdint.h>
#include <string.h>

#define BLOCK 4096u /* words that share one B */

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
/* The same, of a multiple of 8 words and of 16: words at even and at odd places have products of their own. */
__attribute__((target("avx2")))
static uint64_t dot_of_8(const unsigned char *data, const uint32_t *low, const uint32_t *high, uint64_t num_words)
{
    __m256i even = _mm256_setzero_si256(), odd = even, upper = even;
    for (uint64_t i = 0; i < num_words; i += 8) {
        __builtin_prefetch(data + 4 * i + AHEAD_BYTES);
        __m256i w = _mm256_loadu_si256((const __m256i *)(data + 4 * i));
        __m256i l = _mm256_loadu_si256((const __m256i *)(low + i));
        __m256i h = _mm256_loadu_si256((const __m256i *)(high + i));
        even = _mm256_add_epi64(even, _mm256_mul_epu32(w, l));
        odd = _mm256_add_epi64(odd, _mm256_mul_epu32(_mm256_srli_epi64(w, 32), _mm256_srli_epi64(l, 32)));
        upper = _mm256_add_epi32(upper, _mm256_mullo_epi32(w, h));
    }
    even = _mm256_add_epi64(even, odd);
    even = _mm256_add_epi64(even, _mm256_slli_epi64(upper, 32));
    even = _mm256_add_epi64(even, _mm256_slli_epi64(_mm256_srli_epi64(upper, 32), 32));
    uint64_t lanes[4];
    _mm256_storeu_si256((__m256i *)lanes, even);
    return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

__attribute__((target("avx512f")))
static uint64_t dot_of_16(const unsigned char *data, const uint32_t *low, const uint32_t *high, uint64_t num_words)
{
    __m512i even = _mm512_setzero_si512(), odd = even, upper = even;
    for (uint64_t i = 0; i < num_words; i += 16) {
        __builtin_prefetch(data + 4 * i + AHEAD_BYTES);
        __m512i w = _mm512_loadu_si512(data + 4 * i);
        __m512i l = _mm512_loadu_si512(low + i);
        __m512i h = _mm512_loadu_si512(high + i);
        even = _mm512_add_epi64(even, _mm512_mul_epu32(w, l));
        odd = _mm512_add_epi64(odd, _mm512_mul_epu32(_mm512_srli_epi64(w, 32), _mm512_srli_epi64(l, 32)));
        upper = _mm512_add_epi32(upper, _mm512_mullo_epi32(w, h));
    }
    even = _mm512_add_epi64(even, odd);
    even = _mm512_add_epi64(even, _mm512_slli_epi64(upper, 32));
    even = _mm512_add_epi64(even, _mm512_slli_epi64(_mm512_srli_epi64(upper, 32), 32));
    return (uint64_t)_mm512_reduce_add_epi64(even);
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
        uint64_t place = first / 4, room = BLOCK - place % BLOCK, num_words = num_bytes / 4;
        num_words = num_words < room ? num_words : room;
        total += dot(data, low + place % BLOCK, high + place % BLOCK, num_words) * weight_of_block(place / BLOCK);
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
