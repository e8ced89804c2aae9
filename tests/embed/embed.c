/*
 * A program that embeds both sides of umem, as a monitor would embed one of them: an event loop around
 * poll(), vCPUs that read and write guest memory during the migration, a device state whose loading
 * touches guest memory.
 *
 *     embed SCENARIO SOCKET    prints "SCENARIO: ok", or the failed check with exit status 1
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "umem.h"

#define PAGE 4096ul
#define WORDS (PAGE / sizeof(uint64_t))
#define PAGES 4096ul
#define BYTES (PAGES * PAGE)
#define VCPUS 2ul
#define ACCESSES (2 * PAGES)
#define LANES 3
/* A limit far beyond the duration of every wait. */
#define DEADLINE_MS 60000

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition))                                                                          \
            fail(__LINE__, #condition);                                                            \
    } while (0)
#define OK(call) CHECK((call) == UMEM_OK)

static const char STATE[] = "registers, and where the rings are";

static _Noreturn void fail(int line, const char *what) {
    printf("line %d: check failed: %s; last error of umem: %s; errno: %s\n", line, what, umem_last_error(),
           strerror(errno));
    fflush(stdout);
    _exit(1);
}

/* A word of a page. A quarter of the pages were never written, a quarter have zeroes. */
static uint64_t word(uint64_t page, uint64_t index, uint64_t version) {
    if (version == 0 && page % 4 < 2)
        return 0;
    return ((page << 32) + (version << 16) + index) * 0x9e3779b97f4a7c15ul | 1;
}

static int memory_file(void) {
    int file = memfd_create("ram", MFD_CLOEXEC);
    CHECK(file >= 0 && ftruncate(file, BYTES) == 0);
    return file;
}

/* The source's memory, as a guest leaves it that has run for a while. */
static int source_memory(void) {
    int file = memory_file();
    uint64_t content[WORDS];
    for (uint64_t page = 0; page < PAGES; page++) {
        for (uint64_t index = 0; index < WORDS; index++)
            content[index] = word(page, index, 0);
        if (page % 4 != 0)
            CHECK(pwrite(file, content, PAGE, (off_t)(page * PAGE)) == (ssize_t)PAGE);
    }
    return file;
}

static void check_source(int file) {
    uint64_t content[WORDS];
    for (uint64_t page = 0; page < PAGES; page++) {
        CHECK(pread(file, content, PAGE, (off_t)(page * PAGE)) == (ssize_t)PAGE);
        for (uint64_t index = 0; index < WORDS; index++)
            CHECK(content[index] == word(page, index, 0));
    }
}

/* The destination's guest. */
struct guest {
    volatile uint64_t *memory;
    int file; /* -1: anonymous */
    uint64_t version[PAGES];
    pthread_t vcpus[VCPUS];
    size_t started;
};

struct vcpu {
    struct guest *guest;
    size_t index;
};

static struct guest *new_guest(int file) {
    struct guest *guest = calloc(1, sizeof *guest);
    CHECK(guest);
    int flags = file < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
    void *memory = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, flags, file, 0);
    CHECK(memory != MAP_FAILED);
    guest->memory = memory;
    guest->file = file;
    return guest;
}

static void free_guest(struct guest *guest) {
    CHECK(munmap((void *)guest->memory, BYTES) == 0);
    if (guest->file >= 0)
        close(guest->file);
    free(guest);
}

static void check_page(struct guest *guest, uint64_t page) {
    for (uint64_t index = 0; index < WORDS; index++)
        CHECK(guest->memory[page * WORDS + index] == word(page, index, guest->version[page]));
}

/* Reads random pages that no other vCPU uses, and rewrites a third of them. */
static void *run_vcpu(void *argument) {
    struct vcpu vcpu = *(struct vcpu *)argument;
    free(argument);
    struct guest *guest = vcpu.guest;
    uint64_t random = 88172645463325252ul + vcpu.index;
    for (size_t access = 0; access < ACCESSES; access++) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        uint64_t page = random % (PAGES / VCPUS) * VCPUS + vcpu.index;
        check_page(guest, page);
        if (random >> 60 < 5) {
            uint64_t version = ++guest->version[page];
            for (uint64_t index = 0; index < WORDS; index++)
                guest->memory[page * WORDS + index] = word(page, index, version);
        }
    }
    return NULL;
}

static void start_guest(struct guest *guest) {
    for (size_t index = 0; index < VCPUS; index++) {
        struct vcpu *vcpu = malloc(sizeof *vcpu);
        CHECK(vcpu);
        *vcpu = (struct vcpu){guest, index};
        CHECK(pthread_create(&guest->vcpus[index], NULL, run_vcpu, vcpu) == 0);
        guest->started++;
    }
}

/* Joins the vCPUs, then checks every page. */
static void check_guest(struct guest *guest) {
    for (size_t index = 0; index < guest->started; index++)
        CHECK(pthread_join(guest->vcpus[index], NULL) == 0);
    for (uint64_t page = 0; page < PAGES; page++)
        check_page(guest, page);
}

/* Whether any mapping in the range is registered with a userfaultfd. */
static bool is_registered(const volatile void *memory) {
    FILE *smaps = fopen("/proc/self/smaps", "r");
    CHECK(smaps);
    unsigned long start = 0, end = 0, at = (unsigned long)memory;
    bool found = false;
    char line[1024];
    while (fgets(line, sizeof line, smaps)) {
        if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
            continue;
        if (strncmp(line, "VmFlags:", 8) == 0 && start < at + BYTES && at < end)
            found |= strstr(line, " um") != NULL;
    }
    fclose(smaps);
    return found;
}

/* The number of threads whose names begin with umem-; each must block the signals that a host handles. */
static size_t umem_threads(void) {
    static const int handled[] = {SIGHUP, SIGINT, SIGUSR1, SIGPIPE, SIGALRM, SIGTERM, SIGCHLD};
    DIR *tasks = opendir("/proc/self/task");
    CHECK(tasks);
    size_t count = 0;
    for (struct dirent *task; (task = readdir(tasks));) {
        char path[512], line[256];
        bool ours = false;
        snprintf(path, sizeof path, "/proc/self/task/%s/status", task->d_name);
        FILE *status = task->d_name[0] == '.' ? NULL : fopen(path, "r");
        if (!status)
            continue;
        unsigned long blocked = 0;
        while (fgets(line, sizeof line, status)) {
            ours |= strncmp(line, "Name:\tumem-", 11) == 0;
            if (strncmp(line, "SigBlk:", 7) == 0)
                blocked = strtoul(line + 7, NULL, 16);
        }
        fclose(status);
        count += ours;
        for (size_t index = 0; ours && index < sizeof handled / sizeof *handled; index++)
            CHECK(blocked >> (handled[index] - 1) & 1);
    }
    closedir(tasks);
    return count;
}

/* Pages of each vCPU that the source's guest writes during the migration. */
#define HOT 300ul

/* The source's guest, which runs until it is told to stop. Writes of its first vCPU are reported one by one; writes of
 * the second go into a log such as KVM's. */
struct running {
    volatile uint64_t *memory;
    umem_source *source;
    uint64_t version[PAGES];
    _Atomic uint64_t log[PAGES / 64];
    atomic_bool stops;
    pthread_t vcpus[VCPUS];
    unsigned reads; /* of the log while the guest runs */
};

static void write_page(struct running *running, uint64_t page) {
    uint64_t version = ++running->version[page];
    for (uint64_t index = 0; index < WORDS; index++)
        running->memory[page * WORDS + index] = word(page, index, version);
    if (page % VCPUS == 0)
        OK(umem_source_written(running->source, 0, &(umem_range){page * PAGE, PAGE}, 1));
    else
        atomic_fetch_or(&running->log[page / 64], (uint64_t)1 << page % 64);
}

static void write_on(struct running *running, uint64_t of) {
    for (uint64_t turn = 0; !atomic_load(&running->stops); turn++)
        write_page(running, turn * 7919 % HOT * VCPUS + of);
}

static void *write_even(void *running) {
    write_on(running, 0);
    return NULL;
}

static void *write_odd(void *running) {
    write_on(running, 1);
    return NULL;
}

static struct running *run_source(umem_source *source, int file) {
    struct running *running = calloc(1, sizeof *running);
    CHECK(running);
    void *memory = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    CHECK(memory != MAP_FAILED);
    running->memory = memory;
    running->source = source;
    CHECK(pthread_create(&running->vcpus[0], NULL, write_even, running) == 0);
    CHECK(pthread_create(&running->vcpus[1], NULL, write_odd, running) == 0);
    return running;
}

/* Reports the contents of the log, and clears the log. */
static void read_log(struct running *running) {
    uint64_t words[PAGES / 64];
    for (size_t index = 0; index < PAGES / 64; index++)
        words[index] = atomic_exchange(&running->log[index], 0);
    OK(umem_source_written_bitmap(running->source, 0, words, PAGES / 64));
}

static void stop_source(struct running *running) {
    atomic_store(&running->stops, true);
    for (size_t index = 0; index < VCPUS; index++)
        CHECK(pthread_join(running->vcpus[index], NULL) == 0);
    /* The last writes: pages of holes, of zeroes and of data. */
    for (uint64_t page = PAGES - 8; page < PAGES; page++)
        write_page(running, page);
    read_log(running);
}

/* Both sides of a migration, and the events so far. */
struct migration {
    struct running *running; /* the source's guest, with precopy */
    umem_source *source;
    umem_destination *destination;
    struct guest *guest;
    int source_file;
    pthread_t loader;
    bool is_loading;
    bool cancels;        /* on UMEM_EVENT_STOP */
    const char *refuses; /* reason on UMEM_EVENT_LOAD */
    bool loses;          /* loses the source on UMEM_EVENT_RUN */
    bool pauses;         /* on UMEM_EVENT_RUN; resumes at another address */
    bool dials;
    bool checks; /* with checksums */
    unsigned seen_by_source, seen_by_destination;
    umem_status failed_source, failed_destination;
    umem_guest guest_of_source, guest_of_destination;
    char text_source[512], text_destination[512];
};

#define SEEN(kind) (1u << (kind))
#define ENDED (SEEN(UMEM_EVENT_COMPLETED) | SEEN(UMEM_EVENT_FAILED))

static void wrong(umem_status status, umem_status expected, const char *hint);

/* As many connections as there are lanes, both ends in the same order. */
static void make_pairs(int *here, int *there, int lanes) {
    for (int lane = 0; lane < lanes; lane++) {
        int pair[2];
        CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
        here[lane] = pair[0];
        there[lane] = pair[1];
    }
}

/* Both sides have reported the loss: give them other connections. */
static void reconnect(struct migration *migration) {
    int here[LANES], there[LANES];
    make_pairs(here, there, LANES);
    wrong(umem_source_reconnect(migration->source, here, 1), UMEM_ERR_USAGE, "as many");
    wrong(umem_source_reconnect(migration->source, (int[]){here[0], here[0], here[1]}, LANES),
          UMEM_ERR_USAGE, "twice");
    CHECK(fcntl(here[0], F_GETFD) >= 0); /* still ours */
    OK(umem_source_reconnect(migration->source, here, LANES));
    OK(umem_destination_reconnect(migration->destination, there, LANES));
}

/* The destination listens on another address, and the source dials that address. */
static void go_elsewhere(struct migration *migration) {
    char before[256];
    snprintf(before, sizeof before, "%s", umem_destination_uri(migration->destination));
    wrong(umem_destination_resume(migration->destination, "fd:3"), UMEM_ERR_USAGE, "connection");
    OK(umem_destination_resume(migration->destination, "tcp:127.0.0.1:0"));
    const char *uri = umem_destination_uri(migration->destination);
    CHECK(uri && strcmp(uri, before) != 0);
    OK(umem_source_resume(migration->source, uri));
}

#define PAUSED SEEN(UMEM_EVENT_PAUSED)

/* Continues once both sides have reported the loss of the connections. */
static void paused(struct migration *migration) {
    CHECK(migration->pauses);
    if (migration->dials)
        go_elsewhere(migration);
    else if (migration->seen_by_source & migration->seen_by_destination & PAUSED)
        reconnect(migration);
}

/* A device state has the addresses of the device's rings; loading the state reads the rings. */
static void *load(void *argument) {
    struct migration *migration = argument;
    check_page(migration->guest, 2);
    check_page(migration->guest, PAGES - 1);
    OK(umem_destination_loaded(migration->destination));
    return NULL;
}

/* Checks the report's checksum fields. The wire damages nothing, so the digests of both sides match. */
static void check_sums(struct migration *migration, const char *report, const umem_stats *stats) {
    static const char DIGEST[] = "\"digest\":\"", PEER[] = "\"peer\":\"";
    CHECK(strstr(report, migration->checks ? "\"checksum\":true" : "\"checksum\":false"));
    CHECK(stats->checksum_errors == 0 && strstr(report, "\"checksum_errors\":0"));
    const char *digest = strstr(report, DIGEST), *peer = strstr(report, PEER);
    CHECK(!digest == !migration->checks && !peer == !migration->checks);
    if (migration->checks)
        CHECK(memcmp(digest + strlen(DIGEST), peer + strlen(PEER), 16) == 0);
}

static void source_event(struct migration *migration, const umem_event *event) {
    migration->seen_by_source |= SEEN(event->kind);
    umem_stats stats;
    switch (event->kind) {
    case UMEM_EVENT_STOP:
        wrong(umem_source_pause(migration->source), UMEM_ERR_USAGE,
              migration->pauses ? "has not been handed over" : "");
        if (migration->running) {
            stop_source(migration->running);
            memcpy(migration->guest->version, migration->running->version,
                   sizeof migration->guest->version);
        }
        if (migration->cancels)
            OK(umem_source_cancel(migration->source));
        else
            OK(umem_source_stopped(migration->source));
        if (migration->running)
            wrong(umem_source_written(migration->source, 0, &(umem_range){0, 1}, 1), UMEM_ERR_USAGE,
                  "stand still");
        break;
    case UMEM_EVENT_READ_LOG:
        migration->running->reads++;
        read_log(migration->running);
        OK(umem_source_log_read(migration->source));
        break;
    case UMEM_EVENT_SAVE:
        OK(umem_source_saved(migration->source, STATE, sizeof STATE));
        break;
    case UMEM_EVENT_RUNNING:
        CHECK(event->downtime_us > 0 && event->guest == UMEM_GUEST_AT_DESTINATION);
        break;
    case UMEM_EVENT_COMPLETED:
        CHECK(strstr(event->text, "\"role\":\"source\""));
        CHECK(!strstr(event->text, "\"precopy_bytes\":0,") == !!migration->running);
        OK(umem_source_stats(migration->source, &stats));
        CHECK(stats.total_bytes == BYTES && stats.missing_bytes == 0);
        check_sums(migration, event->text, &stats);
        break;
    case UMEM_EVENT_FAILED:
        migration->failed_source = event->status;
        migration->guest_of_source = event->guest;
        snprintf(migration->text_source, sizeof migration->text_source, "%s", event->text);
        break;
    case UMEM_EVENT_PAUSED:
        CHECK(!migration->dials && event->text[0]);
        paused(migration);
        break;
    case UMEM_EVENT_RESUMED:
        CHECK(event->guest == UMEM_GUEST_AT_DESTINATION && event->disconnected_us > 0);
        break;
    default:
        break;
    }
}

static void destination_event(struct migration *migration, const umem_event *event) {
    migration->seen_by_destination |= SEEN(event->kind);
    umem_stats stats;
    switch (event->kind) {
    case UMEM_EVENT_LOAD:
        CHECK(event->data_bytes == sizeof STATE && memcmp(event->data, STATE, sizeof STATE) == 0);
        if (migration->refuses) {
            OK(umem_destination_refuse(migration->destination, migration->refuses));
            break;
        }
        CHECK(pthread_create(&migration->loader, NULL, load, migration) == 0);
        migration->is_loading = true;
        break;
    case UMEM_EVENT_RUN:
        CHECK(event->guest == UMEM_GUEST_AT_DESTINATION);
        CHECK(umem_threads() >= 4);
        if (migration->loses) {
            wrong(umem_destination_pause(migration->destination), UMEM_ERR_USAGE, "recover");
            umem_source_destroy(migration->source);
            migration->source = NULL;
            break;
        }
        /* Few pages have arrived yet. */
        if (migration->pauses)
            OK(umem_destination_pause(migration->destination));
        start_guest(migration->guest);
        OK(umem_destination_running(migration->destination));
        break;
    case UMEM_EVENT_COMPLETED:
        CHECK(strstr(event->text, "\"role\":\"destination\""));
        OK(umem_destination_stats(migration->destination, &stats));
        CHECK(stats.total_bytes == BYTES && stats.missing_bytes == 0);
        CHECK(stats.data_bytes + stats.zero_bytes + stats.hole_bytes == BYTES);
        CHECK(stats.pages_demand + stats.pages_background == PAGES);
        check_sums(migration, event->text, &stats);
        break;
    case UMEM_EVENT_FAILED:
        migration->failed_destination = event->status;
        migration->guest_of_destination = event->guest;
        snprintf(migration->text_destination, sizeof migration->text_destination, "%s",
                 event->text);
        break;
    case UMEM_EVENT_PAUSED:
        CHECK(strstr(event->text, "manually"));
        paused(migration);
        break;
    case UMEM_EVENT_RESUMED:
        CHECK(event->guest == UMEM_GUEST_AT_DESTINATION && event->disconnected_us > 0);
        break;
    default:
        break;
    }
}

/* The program's main loop, until both sides have had their last event. */
static void run(struct migration *migration) {
    umem_event event;
    while (!(migration->seen_by_destination & ENDED) ||
           (migration->source && !(migration->seen_by_source & ENDED))) {
        struct pollfd ready[2] = {
            {umem_destination_event_fd(migration->destination), POLLIN, 0},
            {migration->source ? umem_source_event_fd(migration->source) : -1, POLLIN, 0},
        };
        CHECK(ready[0].fd >= 0);
        CHECK(poll(ready, 2, DEADLINE_MS) > 0);
        if (ready[1].revents) {
            OK(umem_source_next_event(migration->source, &event));
            CHECK(event.kind != UMEM_EVENT_NONE);
            source_event(migration, &event);
        }
        if (ready[0].revents) {
            OK(umem_destination_next_event(migration->destination, &event));
            CHECK(event.kind != UMEM_EVENT_NONE);
            destination_event(migration, &event);
        }
    }
    if (migration->is_loading)
        CHECK(pthread_join(migration->loader, NULL) == 0);
}

static void finish(struct migration *migration) {
    umem_source_destroy(migration->source);
    umem_destination_destroy(migration->destination);
    CHECK(umem_threads() == 0);
    free_guest(migration->guest);
    free(migration);
}

/* The program's position in its file, which umem must not move. */
#define POSITION 12345

/* Both sides, not started, without an address or connections. */
static struct migration *new_migration(int source_file, int destination_file) {
    struct migration *migration = calloc(1, sizeof *migration);
    CHECK(migration);
    migration->guest = new_guest(destination_file);
    migration->source_file = source_file;
    CHECK(lseek(source_file, POSITION, SEEK_SET) == POSITION);
    CHECK(destination_file < 0 || lseek(destination_file, POSITION, SEEK_SET) == POSITION);
    migration->source = umem_source_new();
    migration->destination = umem_destination_new();
    CHECK(migration->source && migration->destination);
    OK(umem_source_region(migration->source, "ram0", source_file));
    OK(umem_destination_region(migration->destination, "ram0", (void *)migration->guest->memory,
                               BYTES, destination_file));
    return migration;
}

static void connect_both(struct migration *migration, int lanes) {
    int here[LANES], there[LANES];
    make_pairs(here, there, lanes);
    OK(umem_source_connections(migration->source, here, lanes));
    OK(umem_destination_connections(migration->destination, there, lanes));
}

static void start_both(struct migration *migration) {
    OK(umem_destination_start(migration->destination));
    CHECK(is_registered(migration->guest->memory));
    OK(umem_source_start(migration->source));
}

static void listen_and_start(struct migration *migration, const char *uri) {
    OK(umem_destination_listen(migration->destination, uri, LANES));
    OK(umem_destination_start(migration->destination));
    const char *bound = umem_destination_uri(migration->destination);
    CHECK(bound && !strstr(bound, ":0:") && is_registered(migration->guest->memory));
    OK(umem_source_dial(migration->source, bound, LANES - 1));
    OK(umem_source_start(migration->source));
}

#define OF_LINK (SEEN(UMEM_EVENT_RECOVERING) | PAUSED | SEEN(UMEM_EVENT_RESUMED))

/* Runs the migration to its end, and checks every word, with the guest's writes during the migration. */
static void succeed(struct migration *migration) {
    run(migration);
    if (!(migration->seen_by_source & migration->seen_by_destination & SEEN(UMEM_EVENT_COMPLETED)))
        printf("source: %s; destination: %s\n", migration->text_source,
               migration->text_destination);
    CHECK((migration->seen_by_destination & ~OF_LINK) ==
          (SEEN(UMEM_EVENT_CONNECTED) | SEEN(UMEM_EVENT_LOAD) | SEEN(UMEM_EVENT_RUN) |
           SEEN(UMEM_EVENT_COMPLETED)));
    CHECK((migration->seen_by_source & ~(OF_LINK | SEEN(UMEM_EVENT_READ_LOG))) ==
          (SEEN(UMEM_EVENT_CONNECTED) | SEEN(UMEM_EVENT_STOP) | SEEN(UMEM_EVENT_SAVE) |
           SEEN(UMEM_EVENT_RUNNING) | SEEN(UMEM_EVENT_COMPLETED)));
    unsigned of_link = OF_LINK & migration->seen_by_source & migration->seen_by_destination;
    CHECK(migration->pauses ? of_link & SEEN(UMEM_EVENT_RESUMED) : of_link == 0);
    check_guest(migration->guest);
    CHECK(!is_registered(migration->guest->memory));
    int destination_file = migration->guest->file;
    CHECK(lseek(migration->source_file, 0, SEEK_CUR) == POSITION);
    CHECK(destination_file < 0 || lseek(destination_file, 0, SEEK_CUR) == POSITION);
    finish(migration);
}

static void shared(const char *socket) {
    (void)socket;
    int file = source_memory();
    struct migration *migration = new_migration(file, memory_file());
    connect_both(migration, LANES);
    start_both(migration);
    succeed(migration);
    check_source(file);
    close(file);
}

static void anonymous(const char *socket) {
    char uri[256];
    snprintf(uri, sizeof uri, "unix:%s", socket);
    int file = source_memory();
    struct migration *migration = new_migration(file, -1);
    listen_and_start(migration, uri);
    succeed(migration);
    check_source(file);
    close(file);
}

/* The program replaces lost connections. */
static void reconnected(const char *socket) {
    (void)socket;
    int file = source_memory();
    for (int kind = 0; kind < 2; kind++) {
        struct migration *migration = new_migration(file, kind == 0 ? memory_file() : -1);
        migration->pauses = true;
        OK(umem_source_recover(migration->source, true));
        OK(umem_destination_recover(migration->destination, true));
        connect_both(migration, LANES);
        start_both(migration);
        succeed(migration);
    }
    check_source(file);
    close(file);
}

/* The destination is at another address from then on. */
static void moved_elsewhere(const char *socket) {
    char uri[256];
    snprintf(uri, sizeof uri, "unix:%s", socket);
    int file = source_memory();
    struct migration *migration = new_migration(file, memory_file());
    migration->pauses = migration->dials = true;
    listen_and_start(migration, uri);
    succeed(migration);
    close(file);
}

/* The source asks for checksums, over one connection and over several, and the destination follows. */
static void checked(const char *socket) {
    (void)socket;
    int file = source_memory();
    for (int lanes = 1; lanes <= LANES; lanes += LANES - 1) {
        struct migration *migration = new_migration(file, lanes == 1 ? memory_file() : -1);
        migration->checks = true;
        OK(umem_source_checksum(migration->source, true));
        connect_both(migration, lanes);
        start_both(migration);
        succeed(migration);
    }
    check_source(file);
    close(file);
}

static void precopy(const char *socket) {
    (void)socket;
    int file = source_memory();
    struct migration *migration = new_migration(file, -1);
    OK(umem_source_postcopy(migration->source, false));
    connect_both(migration, 1);
    start_both(migration);
    succeed(migration);
    close(file);
}

/* Pages move while the source's guest runs and writes them; the rest after the switchover, or before it. */
static void rounds(const char *socket) {
    (void)socket;
    for (int postcopy = 0; postcopy < 2; postcopy++) {
        int file = source_memory();
        struct migration *migration = new_migration(file, memory_file());
        OK(umem_source_precopy(migration->source, 4, 0));
        OK(umem_source_log(migration->source, true));
        OK(umem_source_postcopy(migration->source, postcopy));
        OK(umem_source_checksum(migration->source, true));
        migration->checks = true;
        connect_both(migration, LANES);
        start_both(migration);
        struct running *running = run_source(migration->source, file);
        migration->running = running;
        wrong(umem_source_written(migration->source, 1, &(umem_range){0, 1}, 1), UMEM_ERR_USAGE,
              "region 1 has no 1 bytes at 0");
        wrong(umem_source_written(migration->source, 0, (umem_range[]){{0, 1}, {BYTES, 1}}, 2),
              UMEM_ERR_USAGE, "has no 1 bytes");
        wrong(umem_source_written(migration->source, 0, &(umem_range){UINT64_MAX, 2}, 1),
              UMEM_ERR_USAGE, "has no 2 bytes");
        wrong(umem_source_written(migration->source, 0, NULL, 1), UMEM_ERR_USAGE, "ranges is NULL");
        wrong(umem_source_written_bitmap(migration->source, 0, NULL, 1), UMEM_ERR_USAGE,
              "words is NULL");
        uint64_t behind[PAGES / 64 + 1] = {[PAGES / 64] = 1};
        wrong(umem_source_written_bitmap(migration->source, 0, behind, PAGES / 64 + 1),
              UMEM_ERR_USAGE, "has no 4096 bytes");
        OK(umem_source_written_bitmap(migration->source, 0, behind, PAGES / 64));
        succeed(migration);
        CHECK(running->reads > 0 && running->version[0] > 0 && running->version[1] > 0);
        CHECK(munmap((void *)running->memory, BYTES) == 0);
        free(running);
        close(file);
    }
    /* In anonymous memory no page lands twice: the migration fails before the guest is stopped. */
    int file = source_memory();
    struct migration *migration = new_migration(file, -1);
    OK(umem_source_precopy(migration->source, 4, 0));
    connect_both(migration, LANES);
    start_both(migration);
    run(migration);
    CHECK(migration->failed_destination == UMEM_ERR_UNSUPPORTED);
    CHECK(migration->failed_source == UMEM_ERR_PEER);
    CHECK(!(migration->seen_by_source & SEEN(UMEM_EVENT_STOP)));
    CHECK(migration->guest_of_source == UMEM_GUEST_AT_SOURCE);
    finish(migration);
    check_source(file);
    close(file);
}

static void with_userfaultfd(const char *socket) {
    (void)socket;
    int file = source_memory();
    struct migration *migration = new_migration(file, memory_file());
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    CHECK(uffd >= 0);
    struct uffdio_api api = {
        .api = UFFD_API,
        .features = UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_MISSING_SHMEM |
                    UFFD_FEATURE_MINOR_SHMEM,
    };
    CHECK(ioctl(uffd, UFFDIO_API, &api) == 0);
    OK(umem_destination_userfaultfd(migration->destination, uffd));
    struct uffdio_register registration = {
        .range = {(unsigned long)migration->guest->memory, BYTES},
        .mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR,
    };
    CHECK(ioctl(uffd, UFFDIO_REGISTER, &registration) == 0);
    listen_and_start(migration, "tcp:127.0.0.1:0");
    succeed(migration);
    CHECK(!(fcntl(uffd, F_GETFL) & O_NONBLOCK)); /* unchanged */
    close(uffd);
    close(file);
}

static void cancelled(const char *socket) {
    (void)socket;
    int file = source_memory();
    struct migration *migration = new_migration(file, memory_file());
    migration->cancels = true;
    connect_both(migration, LANES);
    start_both(migration);
    run(migration);
    CHECK(migration->failed_source == UMEM_ERR_CANCELLED);
    CHECK(migration->guest_of_source == UMEM_GUEST_AT_SOURCE);
    CHECK(migration->failed_destination == UMEM_ERR_PEER);
    CHECK(migration->guest_of_destination == UMEM_GUEST_AT_SOURCE);
    CHECK(!is_registered(migration->guest->memory));
    finish(migration);
    /* The guest continued, and moves again. */
    check_source(file);
    migration = new_migration(file, memory_file());
    connect_both(migration, LANES);
    start_both(migration);
    succeed(migration);
    close(file);
}

static void refused(const char *socket) {
    (void)socket;
    int file = source_memory();
    struct migration *migration = new_migration(file, -1);
    migration->refuses = "no such device here:\nadd it";
    connect_both(migration, LANES);
    start_both(migration);
    run(migration);
    CHECK(migration->failed_destination == UMEM_ERR_HOST);
    CHECK(strstr(migration->text_destination, "no such device here: add it"));
    CHECK(migration->guest_of_destination == UMEM_GUEST_AT_SOURCE);
    CHECK(migration->failed_source == UMEM_ERR_PEER);
    CHECK(strstr(migration->text_source, "no such device here: add it"));
    CHECK(migration->guest_of_source == UMEM_GUEST_AT_SOURCE);
    CHECK(!is_registered(migration->guest->memory));
    finish(migration);
    check_source(file);
    close(file);
}

struct reader {
    volatile uint64_t *at;
    uint64_t value;
    atomic_bool is_done;
};

static void *read_word(void *argument) {
    struct reader *reader = argument;
    reader->value = *reader->at;
    atomic_store(&reader->is_done, true);
    return NULL;
}

/* A page that arrived with the device state, and a page without a demand. */
#define CAME 2
#define MISSING 1003

static struct migration *lose_source(int file, int destination_file) {
    struct migration *migration = new_migration(file, destination_file);
    migration->loses = true;
    connect_both(migration, LANES);
    start_both(migration);
    run(migration);
    CHECK(migration->seen_by_destination & SEEN(UMEM_EVENT_FAILED));
    CHECK(migration->failed_destination == UMEM_ERR_PEER ||
          migration->failed_destination == UMEM_ERR_LOST);
    CHECK(migration->text_destination[0] && !strchr(migration->text_destination, '\n'));
    CHECK(migration->guest_of_destination == UMEM_GUEST_AT_DESTINATION);
    return migration;
}

static void lost(const char *socket) {
    (void)socket;
    int file = source_memory();
    for (int kind = 0; kind < 2; kind++) {
        struct migration *migration = lose_source(file, kind == 0 ? memory_file() : -1);
        check_page(migration->guest, CAME);
        struct reader reader = {.at = migration->guest->memory + MISSING * WORDS};
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, read_word, &reader) == 0);
        umem_event event;
        OK(umem_destination_wait(migration->destination, 0, &event));
        CHECK(event.kind == UMEM_EVENT_NONE);
        CHECK(is_registered(migration->guest->memory) && !atomic_load(&reader.is_done));
        /* Only the program can state that the memory is no longer used. */
        OK(umem_destination_guest_has_stopped(migration->destination));
        CHECK(pthread_join(thread, NULL) == 0 && reader.value == 0);
        CHECK(!is_registered(migration->guest->memory));
        finish(migration);
    }
    /* Without that statement missing pages stay blocked, also after the handle is destroyed. */
    struct migration *migration = lose_source(file, memory_file());
    umem_destination_destroy(migration->destination);
    migration->destination = NULL;
    CHECK(umem_threads() == 0);
    CHECK(is_registered(migration->guest->memory));
    check_page(migration->guest, CAME);
    finish(migration);
    close(file);
}

static void wrong(umem_status status, umem_status expected, const char *hint) {
    if (status != expected || !strstr(umem_last_error(), hint))
        printf("%d, not %d with: %s\n", status, expected, hint);
    CHECK(status == expected);
    CHECK(strstr(umem_last_error(), hint) && !strchr(umem_last_error(), '\n'));
}

/* A peer may reset a connection at any moment: umem's `resets_at`-th check finds the reset. */
static int looks, resets_at;

int getpeername(int socket, struct sockaddr *restrict address, socklen_t *restrict length) {
    if (++looks == resets_at) {
        errno = ENOTCONN;
        return -1;
    }
    return (int)syscall(SYS_getpeername, socket, address, length);
}

/* After a failed call the program still owns the sockets: open, unchanged, with their flags. */
static void reset(const char *socket) {
    (void)socket;
    int failures = 0;
    for (int side = 0; side < 2; side++) {
        for (resets_at = 1;; resets_at++) {
            int here[LANES], there[LANES];
            make_pairs(here, there, LANES);
            struct stat before[LANES], after;
            for (int index = 0; index < LANES; index++) {
                CHECK(fcntl(here[index], F_SETFL, O_NONBLOCK) == 0);
                CHECK(fstat(here[index], &before[index]) == 0);
            }
            umem_source *source = umem_source_new();
            umem_destination *destination = umem_destination_new();
            looks = 0;
            umem_status status = side == 0
                                     ? umem_source_connections(source, here, LANES)
                                     : umem_destination_connections(destination, here, LANES);
            bool has_been_reset = looks >= resets_at;
            umem_source_destroy(source);
            umem_destination_destroy(destination);
            for (int index = 0; index < LANES; index++) {
                if (status == UMEM_OK) {
                    CHECK(fcntl(here[index], F_GETFD) == -1 && errno == EBADF);
                } else {
                    CHECK(fstat(here[index], &after) == 0 && after.st_ino == before[index].st_ino);
                    CHECK(fcntl(here[index], F_GETFL) & O_NONBLOCK);
                    CHECK(close(here[index]) == 0);
                }
                close(there[index]);
            }
            if (!has_been_reset)
                break;
            failures += status == UMEM_ERR_USAGE;
        }
    }
    CHECK(failures >= 2 * LANES);
    resets_at = 0;
}

static void misused(const char *socket) {
    CHECK(strcmp(umem_last_error(), "") == 0 && strchr(umem_version(), '.'));
    /* Uninitialized contents: umem reads none of them. */
    umem_event event;
    umem_stats stats;
    memset(&event, 0xa5, sizeof event);
    memset(&stats, 0xa5, sizeof stats);
    int pair[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    int empty = memory_file(), full = source_memory();

    umem_source *source = umem_source_new();
    wrong(umem_source_region(NULL, "ram0", full), UMEM_ERR_USAGE, "source is NULL");
    wrong(umem_source_region(source, NULL, full), UMEM_ERR_USAGE, "name is NULL");
    wrong(umem_source_region(source, "\xff", full), UMEM_ERR_USAGE, "UTF-8");
    wrong(umem_source_region(source, "ram0", -1), UMEM_ERR_USAGE, "not a descriptor");
    wrong(umem_source_region(source, "ram0", pair[0]), UMEM_ERR_UNSUPPORTED, "regular file");
    wrong(umem_source_dial(source, "localhost", 1), UMEM_ERR_USAGE, "tcp:HOST:PORT");
    wrong(umem_source_dial(source, "fd:0", 1), UMEM_ERR_USAGE, "one connection");
    wrong(umem_source_dial(source, "tcp:localhost:1", 0), UMEM_ERR_USAGE, "1 to 64");
    wrong(umem_source_connections(source, pair, 0), UMEM_ERR_USAGE, "1 to 65");
    wrong(umem_source_connections(source, NULL, 2), UMEM_ERR_USAGE, "sockets is NULL");
    int twice[2] = {pair[0], pair[0]}, files[2] = {pair[0], full};
    wrong(umem_source_connections(source, twice, 2), UMEM_ERR_USAGE, "twice");
    wrong(umem_source_connections(source, files, 2), UMEM_ERR_USAGE, "no socket");
    CHECK(fcntl(pair[0], F_GETFD) >= 0); /* still ours */
    CHECK(umem_source_event_fd(source) == -1);
    wrong(umem_source_next_event(source, &event), UMEM_ERR_USAGE, "call start first");
    wrong(umem_source_stats(source, &stats), UMEM_ERR_USAGE, "call start first");
    wrong(umem_source_start(source), UMEM_ERR_USAGE, "regions");
    wrong(umem_source_start(source), UMEM_ERR_USAGE, "started already");
    wrong(umem_source_recover(source, true), UMEM_ERR_USAGE, "started already");
    wrong(umem_source_checksum(source, true), UMEM_ERR_USAGE, "started already");
    wrong(umem_source_precopy(source, 4, 0), UMEM_ERR_USAGE, "started already");
    wrong(umem_source_log(source, true), UMEM_ERR_USAGE, "started already");
    wrong(umem_source_pause(source), UMEM_ERR_USAGE, "call start first");
    wrong(umem_source_written(source, 0, &(umem_range){0, 1}, 1), UMEM_ERR_USAGE, "call start first");
    wrong(umem_source_log_read(source), UMEM_ERR_USAGE, "call start first");
    umem_source_destroy(source);

    /* Passes need a connection beside the one for demanded pages. */
    int only[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, only) == 0);
    source = umem_source_new();
    OK(umem_source_region(source, "ram0", full));
    OK(umem_source_connections(source, only, 1));
    OK(umem_source_precopy(source, 4, 0));
    wrong(umem_source_start(source), UMEM_ERR_USAGE, "two or more");
    umem_source_destroy(source);
    close(only[1]);

    source = umem_source_new();
    OK(umem_source_region(source, "ram0", full));
    char uri[256];
    snprintf(uri, sizeof uri, "unix:%s", socket);
    OK(umem_source_dial(source, uri, 1));
    OK(umem_source_start(source));
    wrong(umem_source_wait(source, 0, NULL), UMEM_ERR_USAGE, "event is NULL");
    OK(umem_source_wait(source, DEADLINE_MS, &event));
    CHECK(event.kind == UMEM_EVENT_FAILED && event.status == UMEM_ERR_CONNECT);
    CHECK(event.guest == UMEM_GUEST_AT_SOURCE && strstr(event.text, uri));
    wrong(umem_source_stopped(source), UMEM_ERR_USAGE, "has not asked");
    wrong(umem_source_log_read(source), UMEM_ERR_USAGE, "has not asked");
    umem_source_destroy(source);
    umem_source_destroy(NULL);

    void *memory = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    void *of_file = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, empty, 0);
    CHECK(memory != MAP_FAILED && of_file != MAP_FAILED);
    *((volatile char *)memory + PAGE) = 1;
    struct {
        void *address;
        int file;
        const char *hint;
    } cases[] = {
        {memory, -1, "MADV_DONTNEED"},
        {memory, empty, "MAP_SHARED"},
        {of_file, -1, "MAP_PRIVATE | MAP_ANONYMOUS"},
        {(char *)of_file + PAGE, empty, "not"},
        {(void *)PAGE, -1, "not all of its addresses are mapped"},
    };
    for (size_t index = 0; index < sizeof cases / sizeof *cases; index++) {
        umem_destination *destination = umem_destination_new();
        OK(umem_destination_region(destination, "ram0", cases[index].address, BYTES,
                                   cases[index].file));
        wrong(umem_destination_guest_has_stopped(destination), UMEM_ERR_USAGE, "start first");
        OK(umem_destination_listen(destination, "tcp:127.0.0.1:0", 1));
        wrong(umem_destination_start(destination), UMEM_ERR_UNSUPPORTED, cases[index].hint);
        CHECK(!umem_destination_uri(destination));
        umem_destination_destroy(destination);
    }
    umem_destination *destination = umem_destination_new();
    wrong(umem_destination_region(destination, "ram0", of_file, BYTES, full),
          UMEM_ERR_UNSUPPORTED, "contents");
    wrong(umem_destination_region(destination, "ram0", of_file, 0, empty), UMEM_ERR_USAGE, "0");
    OK(umem_destination_region(destination, "ram0", of_file, BYTES, empty));
    wrong(umem_destination_listen(destination, "unix:", 1), UMEM_ERR_USAGE, "names no socket");
    OK(umem_destination_listen(destination, uri, 1));
    OK(umem_destination_start(destination));
    CHECK(is_registered(of_file));
    wrong(umem_destination_running(destination), UMEM_ERR_USAGE, "has not asked");
    wrong(umem_destination_refuse(destination, "why"), UMEM_ERR_USAGE, "has not asked");
    wrong(umem_destination_pause(destination), UMEM_ERR_USAGE, "no connections yet");
    wrong(umem_destination_resume(destination, NULL), UMEM_ERR_USAGE, "no connections yet");
    wrong(umem_destination_reconnect(destination, pair, 2), UMEM_ERR_USAGE, "no connections yet");
    wrong(umem_destination_guest_has_stopped(destination), UMEM_ERR_USAGE, "still runs");
    umem_destination *second = umem_destination_new();
    OK(umem_destination_region(second, "ram0", memory, BYTES, -1));
    OK(umem_destination_listen(second, uri, 1));
    wrong(umem_destination_start(second), UMEM_ERR_LISTEN, "another program listens");
    umem_destination_destroy(second);
    OK(umem_destination_cancel(destination));
    OK(umem_destination_wait(destination, DEADLINE_MS, &event));
    CHECK(event.kind == UMEM_EVENT_FAILED && event.status == UMEM_ERR_CANCELLED);
    CHECK(!is_registered(of_file));
    umem_destination_destroy(destination);

    CHECK(umem_threads() == 0);
    CHECK(munmap(memory, BYTES) == 0 && munmap(of_file, BYTES) == 0);
    close(empty), close(full), close(pair[0]), close(pair[1]);
}

int main(int count, char **arguments) {
    static const struct {
        const char *name;
        void (*run)(const char *socket);
    } scenarios[] = {
        {"shared", shared},       {"anonymous", anonymous}, {"userfaultfd", with_userfaultfd},
        {"precopy", precopy},     {"cancel", cancelled},    {"refuse", refused},
        {"lost", lost},           {"misuse", misused},    {"reconnect", reconnected},
        {"elsewhere", moved_elsewhere}, {"checked", checked}, {"reset", reset},
        {"rounds", rounds},
    };
    for (size_t index = 0; count == 3 && index < sizeof scenarios / sizeof *scenarios; index++) {
        if (strcmp(scenarios[index].name, arguments[1]) == 0) {
            scenarios[index].run(arguments[2]);
            printf("%s: ok\n", arguments[1]);
            return 0;
        }
    }
    fprintf(stderr, "usage: embed SCENARIO SOCKET\n");
    return 2;
}
