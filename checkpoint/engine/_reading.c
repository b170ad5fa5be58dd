/* Rows of files, each read to where it belongs and fingerprinted while it is in the processor's cache.

   No state and no Python: it is loaded as a plain library, by rows.py, and called without the interpreter's lock.
   Fingerprints are those of _fingerprint.c, which it is linked with. */

#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64

#include <errno.h>
#include <stdint.h>
#include <unistd.h>

#define PIECE_BYTES (512u << 10) /* half of what a core's own cache has, where that is small */

uint64_t holdfast_sum_run(const unsigned char *data, uint64_t num_bytes, uint64_t first, const uint32_t *low,
                          const uint32_t *high);

/* Rows of one length: where the first lies in its file, in memory and in its tensor, and how far the next is. */
struct rows {
    int64_t descriptor;
    uint64_t offset, step;
    uint64_t address, stride;
    uint64_t first, pitch;
    uint64_t num_rows, row_bytes;
};

/* Read one row; return its fingerprint in `sum`, and 0 if the file has not all of it or cannot be read. */
static int read_row(const struct rows *rows, uint64_t number, const uint32_t *low, const uint32_t *high, uint64_t *sum)
{
    unsigned char *memory = (unsigned char *)(uintptr_t)(rows->address + number * rows->stride);
    uint64_t offset = rows->offset + number * rows->step, first = rows->first + number * rows->pitch;
    uint64_t left = rows->row_bytes;
    while (left) {
        ssize_t count = pread((int)rows->descriptor, memory, left < PIECE_BYTES ? left : PIECE_BYTES, (off_t)offset);
        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0)
            return 0;
        *sum += holdfast_sum_run(memory, (uint64_t)count, first, low, high);
        memory += count, offset += (uint64_t)count, first += (uint64_t)count, left -= (uint64_t)count;
    }
    return 1;
}

/* Read all rows of several lots; tell of each its fingerprint, and whether it is all there. */
void holdfast_read_rows(const struct rows *lots, uint64_t num_lots, const uint32_t *low, const uint32_t *high,
                        uint64_t *sums, unsigned char *is_read)
{
    for (uint64_t lot = 0; lot < num_lots; lot++) {
        sums[lot] = 0;
        is_read[lot] = 1;
        for (uint64_t number = 0; is_read[lot] && number < lots[lot].num_rows; number++)
            is_read[lot] = (unsigned char)read_row(lots + lot, number, low, high, sums + lot);
    }
}
