/* Rows of files, each read to where it belongs and fingerprinted while it is in the processor's cache.

   No state and no Python: it is loaded as a plain library, by rows.py, and called without the interpreter's lock.
   Fingerprints are those of _fingerprint.c, which it is linked with. */

#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define PIECE_BYTES (128u << 10)  /* a small part of what a core has as a cache of its own */
#define BLOCK_BYTES (16u << 10)   /* of fingerprints: whole ones are summed fastest */
#define WINDOW_BYTES (4u << 20)

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

/* As rows.py has them, which does not use a library that was built of other sources. */
const char *const holdfast_row_fields = "descriptor offset step address stride first pitch num_rows row_bytes";

static unsigned char *memory_of(const struct rows *rows, uint64_t number)
{
    return (unsigned char *)(uintptr_t)(rows->address + number * rows->stride);
}

/* Read one row; return its fingerprint in `sum`, and 0 if the file has not all of it or cannot be read. */
static int read_row(const struct rows *rows, uint64_t number, const uint32_t *low, const uint32_t *high, uint64_t *sum)
{
    unsigned char *memory = memory_of(rows, number);
    uint64_t offset = rows->offset + number * rows->step, first = rows->first + number * rows->pitch;
    uint64_t left = rows->row_bytes;
    while (left) {
        uint64_t room = PIECE_BYTES - first % BLOCK_BYTES;
        ssize_t count = pread((int)rows->descriptor, memory, left < room ? left : room, (off_t)offset);
        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0)
            return 0;
        *sum += holdfast_sum_run(memory, (uint64_t)count, first, low, high);
        memory += count, offset += (uint64_t)count, first += (uint64_t)count, left -= (uint64_t)count;
    }
    return 1;
}

#ifdef MADV_POPULATE_READ
/* Read rows from `number` on of which each page of the file has some, by a window of it that is mapped; return how
   many, 0 if that cannot be done. To map a page takes half as long as a call for each row.

   The pages are asked for before they are looked at: what the disk cannot give is an error here, not a signal. */
static uint64_t read_window(const struct rows *rows, uint64_t number, const uint32_t *low, const uint32_t *high,
                            uint64_t *sum)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), offset = rows->offset + number * rows->step;
    uint64_t ahead = offset % page, count = (WINDOW_BYTES - ahead - rows->row_bytes) / rows->step + 1;
    if (count > rows->num_rows - number)
        count = rows->num_rows - number;
    size_t num_bytes = ahead + (count - 1) * rows->step + rows->row_bytes;
    struct stat status; /* the last page of a file is mapped as a whole, with zeros behind the end */
    if (fstat((int)rows->descriptor, &status) || (uint64_t)status.st_size < offset - ahead + num_bytes)
        return 0;
    unsigned char *window = mmap(NULL, num_bytes, PROT_READ, MAP_SHARED, (int)rows->descriptor, (off_t)(offset - ahead));
    if (window == MAP_FAILED)
        return 0;
    int is_there = !madvise(window, num_bytes, MADV_POPULATE_READ);
    uint64_t at_once = PIECE_BYTES / (rows->row_bytes + 1) + 1; /* row by row, each sum waits for its own copy */
    for (uint64_t row = 0, end; is_there && row < count; row = end) {
        end = row + at_once < count ? row + at_once : count;
        for (uint64_t next = row; next < end; next++)
            memcpy(memory_of(rows, number + next), window + ahead + next * rows->step, rows->row_bytes);
        for (uint64_t next = row; next < end; next++)
            *sum += holdfast_sum_run(memory_of(rows, number + next), rows->row_bytes,
                                     rows->first + (number + next) * rows->pitch, low, high);
    }
    munmap(window, num_bytes);
    return is_there ? count : 0;
}

static int has_short_gaps(const struct rows *rows)
{
    return rows->num_rows > 1 && rows->step <= (uint64_t)sysconf(_SC_PAGESIZE);
}
#else
static uint64_t read_window(const struct rows *rows, uint64_t number, const uint32_t *low, const uint32_t *high,
                            uint64_t *sum)
{
    return (void)rows, (void)number, (void)low, (void)high, (void)sum, 0;
}

static int has_short_gaps(const struct rows *rows)
{
    return (void)rows, 0;
}
#endif

/* Read all rows of a lot; return its fingerprint in `sum`, and 0 if they are not all there. */
static int read_lot(const struct rows *lot, const uint32_t *low, const uint32_t *high, uint64_t *sum)
{
    int is_mapped = has_short_gaps(lot);
    uint64_t number = 0;
    while (number < lot->num_rows) {
        uint64_t count = is_mapped ? read_window(lot, number, low, high, sum) : 0;
        is_mapped = count > 0;
        if (!count && !read_row(lot, number, low, high, sum))
            return 0;
        number += count ? count : 1;
    }
    return 1;
}

/* Read all rows of several lots; tell of each its fingerprint, and whether it is all there. */
void holdfast_read_rows(const struct rows *lots, uint64_t num_lots, const uint32_t *low, const uint32_t *high,
                        uint64_t *sums, unsigned char *is_read)
{
    for (uint64_t lot = 0; lot < num_lots; lot++) {
        sums[lot] = 0;
        is_read[lot] = (unsigned char)read_lot(lots + lot, low, high, sums + lot);
    }
}
