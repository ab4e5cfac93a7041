/* Preloaded into a training (LD_PRELOAD): counts its file operations, and makes one of them fail or the last one.

   Counted: what changes a file, a folder or a name below FAULT_UNDER, closing a written file included; not counted are
   paths with one of the texts in FAULT_EXCEPT (separated by ':'). Counting begins at the first operation whose path has
   the text FAULT_FROM. Then operation number FAULT_AT (from 1):
     FAULT_KIND=kill    the process dies by SIGKILL before it; of a write, half has happened
     FAULT_KIND=eio     it fails once with EIO
     FAULT_KIND=enospc  it and all later ones that need room fail with ENOSPC, until FAULT_AT + FAULT_FOR
                        (0: for ever); of a write half still fits, as on a disk that becomes full
   Only in the process whose RANK is FAULT_RANK, if that is set.
   Each counted operation is a line "number name path" in FAULT_LOG. The settings are read when FAULT_UNDER first appears, and again after a fork. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { GO_ON, FAIL, HALF };
enum { NEEDS_ROOM = 1, IS_WRITE = 2 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pid_t configured = 0;
static long at, lasting, count;
static int counting, is_active;
static char under[PATH_MAX], from[PATH_MAX], except[PATH_MAX], kind[16], log_path[PATH_MAX];

static void copy_setting(char *out, size_t size, const char *name) {
    const char *value = getenv(name);
    snprintf(out, size, "%s", value ? value : "");
}

static void configure(void) {
    configured = getpid();
    copy_setting(under, sizeof under, "FAULT_UNDER");
    copy_setting(from, sizeof from, "FAULT_FROM");
    copy_setting(except, sizeof except, "FAULT_EXCEPT");
    copy_setting(kind, sizeof kind, "FAULT_KIND");
    copy_setting(log_path, sizeof log_path, "FAULT_LOG");
    at = getenv("FAULT_AT") ? atol(getenv("FAULT_AT")) : 0;
    lasting = getenv("FAULT_FOR") ? atol(getenv("FAULT_FOR")) : 0;
    count = 0;
    counting = from[0] == 0;
    const char *rank = getenv("RANK"), *meant = getenv("FAULT_RANK");
    is_active = under[0] != 0 && (!meant || !*meant || (rank && !strcmp(rank, meant)));
}

static void configure_once(void) {
    if (configured == getpid() && (is_active || !getenv("FAULT_UNDER"))) return;
    pthread_mutex_t fresh = PTHREAD_MUTEX_INITIALIZER;  /* after a fork nobody holds the lock in the copy */
    lock = fresh;
    configure();
}

static int is_meant(const char *path) {
    if (strncmp(path, under, strlen(under)) != 0) return 0;
    char list[PATH_MAX], *rest = list, *text;
    snprintf(list, sizeof list, "%s", except);
    while ((text = strsep(&rest, ":")))
        if (*text && strstr(path + strlen(under), text)) return 0;
    return 1;
}

/* What becomes of an operation; errno is set when it fails. */
static int decide(const char *name, const char *path, int needs) {
    int answer = GO_ON, code = 0;
    configure_once();
    if (!is_active || !is_meant(path)) return GO_ON;
    pthread_mutex_lock(&lock);
    if (!counting && strstr(path, from)) counting = 1;
    if (counting) {
        count++;
        if (log_path[0]) {
            char line[2 * PATH_MAX];
            int size = snprintf(line, sizeof line, "%ld %s %s\n", count, name, path);
            int file = syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_CREAT | O_APPEND, 0644);
            if (file >= 0 && syscall(SYS_write, file, line, size) != size) abort();
            if (file >= 0) syscall(SYS_close, file);
        }
        if (at && !strcmp(kind, "kill") && count == at) answer = (needs & IS_WRITE) ? HALF : FAIL, code = -1;
        if (at && !strcmp(kind, "eio") && count == at) answer = FAIL, code = EIO;
        if (at && !strcmp(kind, "enospc") && count >= at && (!lasting || count < at + lasting) && (needs & NEEDS_ROOM))
            answer = (needs & IS_WRITE) && count == at ? HALF : FAIL, code = ENOSPC;
    }
    pthread_mutex_unlock(&lock);
    if (answer == FAIL && code == -1) kill(getpid(), SIGKILL), pause();
    if (answer != GO_ON) errno = code;
    return answer;
}

/* After a half write: the process dies, or goes on with what is still written (a short count, as the kernel gives). */
static ssize_t after_half(ssize_t done) {
    if (!strcmp(kind, "kill")) kill(getpid(), SIGKILL), pause();
    if (done <= 0) errno = ENOSPC, done = -1;
    return done;
}

static const char *path_of(int fd, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, out, PATH_MAX - 1);
    out[size < 0 ? 0 : size] = 0;
    return out;
}

static const char *absolute(int folder, const char *path, char *out) {
    if (path[0] == '/') return path;
    char start[PATH_MAX];
    if (folder == AT_FDCWD) { if (!getcwd(start, sizeof start)) start[0] = 0; }
    else path_of(folder, start);
    if (snprintf(out, PATH_MAX, "%s/%s", start, path) >= PATH_MAX) out[0] = 0;
    return out;
}

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (!found) abort();
    return found;
}

static int is_for_writing(int flags) { return (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC)); }

#define MODE(flags) \
    va_list list; va_start(list, flags); \
    mode_t mode = (flags) & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0; va_end(list)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        char buffer[PATH_MAX]; MODE(flags); \
        if (is_for_writing(flags) && decide("open", absolute(AT_FDCWD, path, buffer), flags & O_CREAT ? NEEDS_ROOM : 0)) return -1; \
        return REAL(name)(path, flags, mode); }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        char buffer[PATH_MAX]; MODE(flags); \
        if (is_for_writing(flags) && decide("open", absolute(folder, path, buffer), flags & O_CREAT ? NEEDS_ROOM : 0)) return -1; \
        return REAL(name)(folder, path, flags, mode); }
OPENAT(openat)
OPENAT(openat64)

#define CREAT(name) \
    int name(const char *path, mode_t mode) { \
        char buffer[PATH_MAX]; \
        if (decide("open", absolute(AT_FDCWD, path, buffer), NEEDS_ROOM)) return -1; \
        return REAL(name)(path, mode); }
CREAT(creat)
CREAT(creat64)

#define FOPEN(name) \
    FILE *name(const char *path, const char *how) { \
        char buffer[PATH_MAX]; \
        if (how[0] != 'r' && decide("open", absolute(AT_FDCWD, path, buffer), NEEDS_ROOM)) return NULL; \
        return REAL(name)(path, how); }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int fd, const void *data, size_t size) {
    char buffer[PATH_MAX];
    int answer = decide("write", path_of(fd, buffer), NEEDS_ROOM | IS_WRITE);
    if (answer == FAIL) return -1;
    if (answer == HALF) return after_half(REAL(write)(fd, data, size / 2));
    return REAL(write)(fd, data, size);
}

#define PWRITE(name, offset_type) \
    ssize_t name(int fd, const void *data, size_t size, offset_type where) { \
        char buffer[PATH_MAX]; \
        int answer = decide("write", path_of(fd, buffer), NEEDS_ROOM | IS_WRITE); \
        if (answer == FAIL) return -1; \
        if (answer == HALF) return after_half(REAL(name)(fd, data, size / 2, where)); \
        return REAL(name)(fd, data, size, where); }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int fd, const struct iovec *parts, int num_parts) {
    char buffer[PATH_MAX];
    int answer = decide("write", path_of(fd, buffer), NEEDS_ROOM | IS_WRITE);
    if (answer == FAIL) return -1;
    if (answer == HALF) return after_half(num_parts < 1 ? 0 : REAL(write)(fd, parts[0].iov_base, parts[0].iov_len / 2));
    return REAL(writev)(fd, parts, num_parts);
}

#define SENDFILE(name, offset_type) \
    ssize_t name(int out, int in, offset_type *where, size_t size) { \
        char buffer[PATH_MAX]; \
        int answer = decide("write", path_of(out, buffer), NEEDS_ROOM | IS_WRITE); \
        if (answer == FAIL) return -1; \
        if (answer == HALF) return after_half(0); \
        return REAL(name)(out, in, where, size); }
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)

ssize_t copy_file_range(int in, off64_t *in_at, int out, off64_t *out_at, size_t size, unsigned int flags) {
    char buffer[PATH_MAX];
    int answer = decide("write", path_of(out, buffer), NEEDS_ROOM | IS_WRITE);
    if (answer == FAIL) return -1;
    if (answer == HALF) return after_half(0);
    return REAL(copy_file_range)(in, in_at, out, out_at, size, flags);
}

#define ON_FD(name, needs, declaration, ...) \
    int name declaration { \
        char buffer[PATH_MAX]; \
        if (decide(#name, path_of(fd, buffer), needs)) return -1; \
        return REAL(name)(__VA_ARGS__); }
ON_FD(fsync, NEEDS_ROOM, (int fd), fd)
ON_FD(fdatasync, NEEDS_ROOM, (int fd), fd)
ON_FD(fchmod, 0, (int fd, mode_t mode), fd, mode)
ON_FD(ftruncate, NEEDS_ROOM, (int fd, off_t size), fd, size)
ON_FD(ftruncate64, NEEDS_ROOM, (int fd, off64_t size), fd, size)

#define ALLOCATE(name, offset_type) \
    int name(int fd, offset_type where, offset_type size) { \
        char buffer[PATH_MAX]; \
        if (decide(#name, path_of(fd, buffer), NEEDS_ROOM)) return errno; \
        return REAL(name)(fd, where, size); }
ALLOCATE(posix_fallocate, off_t)
ALLOCATE(posix_fallocate64, off64_t)

int close(int fd) {
    char buffer[PATH_MAX];
    int flags = fcntl(fd, F_GETFL);
    if (flags >= 0 && is_for_writing(flags) && decide("close", path_of(fd, buffer), 0)) {
        int code = errno;
        REAL(close)(fd);  /* Linux closes it in any case */
        errno = code;
        return -1;
    }
    return REAL(close)(fd);
}

#define ON_PATH(name, needs, declaration, ...) \
    int name declaration { \
        char buffer[PATH_MAX]; \
        if (decide(#name, absolute(AT_FDCWD, path, buffer), needs)) return -1; \
        return REAL(name)(__VA_ARGS__); }
ON_PATH(mkdir, NEEDS_ROOM, (const char *path, mode_t mode), path, mode)
ON_PATH(rmdir, 0, (const char *path), path)
ON_PATH(unlink, 0, (const char *path), path)
ON_PATH(chmod, 0, (const char *path, mode_t mode), path, mode)

#define ON_PATH_AT(name, needs, declaration, ...) \
    int name declaration { \
        char buffer[PATH_MAX]; \
        if (decide(#name, absolute(folder, path, buffer), needs)) return -1; \
        return REAL(name)(__VA_ARGS__); }
ON_PATH_AT(mkdirat, NEEDS_ROOM, (int folder, const char *path, mode_t mode), folder, path, mode)
ON_PATH_AT(unlinkat, 0, (int folder, const char *path, int flags), folder, path, flags)
ON_PATH_AT(fchmodat, 0, (int folder, const char *path, mode_t mode, int flags), folder, path, mode, flags)

/* The new name is what appears or is replaced, the old one is what vanishes: one of the two being meant is enough. */
static int decide_two(const char *name, int old_folder, const char *old, int folder, const char *path) {
    char one[PATH_MAX], two[PATH_MAX];
    configure_once();
    const char *first = absolute(old_folder, old, one), *second = absolute(folder, path, two);
    return decide(name, is_meant(second) ? second : first, NEEDS_ROOM);
}

#define ON_TWO(name, declaration, old_folder, folder, ...) \
    int name declaration { \
        if (decide_two(#name, old_folder, old, folder, path)) return -1; \
        return REAL(name)(__VA_ARGS__); }
ON_TWO(rename, (const char *old, const char *path), AT_FDCWD, AT_FDCWD, old, path)
ON_TWO(link, (const char *old, const char *path), AT_FDCWD, AT_FDCWD, old, path)
ON_TWO(renameat, (int o, const char *old, int n, const char *path), o, n, o, old, n, path)
ON_TWO(renameat2, (int o, const char *old, int n, const char *path, unsigned int flags), o, n, o, old, n, path, flags)
ON_TWO(linkat, (int o, const char *old, int n, const char *path, int flags), o, n, o, old, n, path, flags)

int symlink(const char *target, const char *path) {
    char buffer[PATH_MAX];
    if (decide("symlink", absolute(AT_FDCWD, path, buffer), NEEDS_ROOM)) return -1;
    return REAL(symlink)(target, path);
}
