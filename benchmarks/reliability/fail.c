/* Loaded before all else: lets the n-th write, fsync or rename of a process fail, when asked. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE, FSYNC, RENAME };
static volatile long counted[3];
static long fail_at = 0, fail_sort = -1, fail_with = 0, for_ever = 0;

/* at: 1 is the first call from now on; 0 only counts. */
void fail_arm(long sort, long at, long error, long lasting) {
    counted[0] = counted[1] = counted[2] = 0;
    fail_sort = sort; fail_at = at; fail_with = error; for_ever = lasting;
}
long fail_count(long sort) { return counted[sort]; }

static int fails(int sort) {
    long now = __sync_add_and_fetch(&counted[sort], 1);
    if (sort != fail_sort || !fail_at || now < fail_at || (!for_ever && now > fail_at)) return 0;
    errno = (int)fail_with;
    return 1;
}
static int is_file(int handle) {
    struct stat found;
    return handle > 2 && !fstat(handle, &found) && S_ISREG(found.st_mode);
}
#define REAL(name, type, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

ssize_t write(int handle, const void *data, size_t size) {
    REAL("write", ssize_t, int, const void *, size_t);
    return is_file(handle) && fails(WRITE) ? -1 : real(handle, data, size);
}
ssize_t writev(int handle, const struct iovec *parts, int count) {
    REAL("writev", ssize_t, int, const struct iovec *, int);
    return is_file(handle) && fails(WRITE) ? -1 : real(handle, parts, count);
}
ssize_t pwrite64(int handle, const void *data, size_t size, off64_t at) {
    REAL("pwrite64", ssize_t, int, const void *, size_t, off64_t);
    return is_file(handle) && fails(WRITE) ? -1 : real(handle, data, size, at);
}
int fsync(int handle) {
    REAL("fsync", int, int);
    return fails(FSYNC) ? -1 : real(handle);
}
int rename(const char *from, const char *to) {
    REAL("rename", int, const char *, const char *);
    return fails(RENAME) ? -1 : real(from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
    REAL("renameat", int, int, const char *, int, const char *);
    return fails(RENAME) ? -1 : real(a, from, b, to);
}
