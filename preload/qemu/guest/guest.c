// SPDX-License-Identifier: MIT OR Apache-2.0
//
// A guest that drives the DMA engine of vfio-preload and checks its own memory, before and
// after a migration. It runs on bare hardware (multiboot, 32 bits, no libc), or with -DLINUX
// as the first program of a Linux, which was told to leave the memory from BASE on alone.
//
// Words of its command line:
//   viommu  drive the engine through a VT-d IOMMU that maps and unmaps all the time
//   zero    zero page table entries when they are unmapped, and not only their R and W
//   stream  the engine also writes by itself
//   nopin   the engine pins nothing: it reaches memory by messages, which cannot be pinned
//   background  the engine does commands in the background, and is polled
//   cpu     do not drive the engine at all; the processor writes
//
// It prints "ok ROUND" for each round that finds its memory right, and "BAD" for ever after
// the first that does not. It writes pages that the engine writes only before its first
// round: so nothing but the engine's dirty bits brings them to the destination.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned u32;
typedef unsigned long long u64;

// ---- where it runs

#ifdef LINUX
#include <fcntl.h>
#include <sys/io.h>
#include <sys/mman.h>
#include <unistd.h>

#define BASE 0x8000000u
#define SPAN 0xc00000u

static volatile u8 *window, *registers;

static volatile u32 *word(u32 addr) { return (volatile u32 *)(window + (addr - BASE)); }
static volatile u32 *reg_word(u32 addr) { return (volatile u32 *)(registers + (addr & 0xfff)); }

static volatile u8 *physical(u32 addr, u32 size)
{
    int fd = open("/dev/mem", O_RDWR | O_SYNC);
    void *at = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, addr);
    close(fd);
    return at == MAP_FAILED ? 0 : at;
}

static int has_memory(void) { return iopl(3) == 0 && (window = physical(BASE, SPAN)); }
static int has_registers(u32 bar) { return !!(registers = physical(bar, 0x1000)); }
static void rest(void) { sleep(1); }
#else
#define BASE 0x700000u

struct multiboot {
    u32 flags, mem_lower, mem_upper, boot_device, cmdline;
};

asm(".section .multiboot, \"a\"\n"
    ".align 4\n"
    ".long 0x1badb002, 0, -0x1badb002\n"
    ".text\n"
    ".globl _start\n"
    "_start:\n"
    "    mov $0x180000, %esp\n"
    "    cld\n"
    "    push %ebx\n"
    "    call kmain\n"
    "1:  hlt\n"
    "    jmp 1b\n");

static volatile u32 *word(u32 addr) { return (volatile u32 *)addr; }
static volatile u32 *reg_word(u32 addr) { return word(addr); }
static int has_memory(void) { return 1; }
static int has_registers(u32 bar) { return !!bar; }
static void rest(void) { asm volatile("hlt"); }
#endif

// ---- the machine

static void out8(u16 port, u8 value) { asm volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static void out32(u16 port, u32 value) { asm volatile("outl %0, %1" ::"a"(value), "Nd"(port)); }

static u8 in8(u16 port)
{
    u8 value;
    asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static u32 in32(u16 port)
{
    u32 value;
    asm volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static void print(const char *text)
{
    for (; *text; text++) {
        while (!(in8(0x3fd) & 0x20))
            ;
        out8(0x3f8, *text);
    }
}

static void print_hex(u32 value)
{
    char digit[2] = { 0, 0 };
    for (int shift = 28; shift >= 0; shift -= 4) {
        digit[0] = "0123456789abcdef"[value >> shift & 15];
        print(digit);
    }
}

static void fail(const char *what, u32 a, u32 b, u32 c)
{
    print("BAD ");
    print(what);
    u32 values[3] = { a, b, c };
    for (int k = 0; k < 3; k++) {
        print(" ");
        print_hex(values[k]);
    }
    print("\n");
    for (;;)
        rest();
}

static u32 pci_read(u32 bdf, u32 at)
{
    out32(0xcf8, 0x80000000u | bdf << 8 | at);
    return in32(0xcfc);
}

static void pci_write(u32 bdf, u32 at, u32 value)
{
    out32(0xcf8, 0x80000000u | bdf << 8 | at);
    out32(0xcfc, value);
}

static u32 seed = 12345;
static int pins_allowed = 1, background;

static u32 any(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 17;
    seed ^= seed << 5;
    return seed;
}

// ---- memory

#define NONE (~0u)
#define PAGE 4096u
#define TABLES BASE              // of VT-d
#define DMA (BASE + 0x100000u)   // pages that the engine writes
#define PAGES 256u
#define SHADOW (BASE + 0x300000u) // what they should be
#define STREAM (BASE + 0x500000u) // pages that the engine writes by itself
#define PLACES 64u
#define FILLED 0x600000u
#define FILLER (BASE + 0x600000u) // cannot be compressed

// ---- the engine

enum { IOVA = 0x00, LENGTH = 0x08, COUNT = 0x0c, STRIDE = 0x10, VALUE = 0x14, COMMAND = 0x18,
       STATUS = 0x1c, RESULT = 0x20, SEQUENCE = 0x24, MAILBOX = 0x28 };
enum { WRITE = 1, READ, PIN, WRITE_PINNED, UNPIN, SHORT_PIN, WRITE_UNMARKED, STREAM_ON, STREAM_OFF };
#define BACKGROUND 0x100u

static u32 bar;

static u32 reg(u32 at) { return *reg_word(bar + at); }
static void set(u32 at, u32 value) { *reg_word(bar + at) = value; }

static void command(u32 what, u32 iova, u32 length, u32 value)
{
    set(IOVA, iova);
    set(IOVA + 4, 0);
    set(LENGTH, length);
    set(COUNT, 1);
    set(STRIDE, 0);
    set(VALUE, value);
    set(COMMAND, background ? what | BACKGROUND : what);
    while (background && !reg(STATUS))
        ;
    if (reg(STATUS) != 1)
        fail("command, iova, length", what, iova, length);
}

static void expect(u32 offset, u32 length, u32 value)
{
    for (u32 at = 0; at < length; at += 4)
        *word(SHADOW + offset + at) = value;
}

static u32 sum(u32 offset, u32 length)
{
    u32 total = 0;
    for (u32 at = 0; at < length; at += 4)
        total += *word(SHADOW + offset + at);
    return total;
}

// One access to `length` bytes at `offset` of the pages, which the engine has at `iova`.
static void use(u32 iova, u32 offset, u32 length)
{
    u32 value = any();
    switch (any() % 4) {
    case 0:
        command(READ, iova, length, 0);
        if (reg(RESULT) != sum(offset, length))
            fail("read, iova, length", reg(RESULT), iova, length);
        return;
    case 1:
        command(pins_allowed ? SHORT_PIN : WRITE, iova, length, value);
        break;
    default:
        command(WRITE, iova, length, value);
    }
    expect(offset, length, value);
}

// ---- without an IOMMU

static struct { u32 offset, length; } pins[8];

static void drive(u32 turn)
{
    u32 offset = any() % (PAGES * PAGE - 8192) & ~3u;
    u32 length = 4 + any() % 8000 / (1 + any() % 64) / 4 * 4;
    u32 k = turn % 8;
    if (any() % 8 == 0 && pins_allowed) {
        // A long pin. Its first one went 8 turns ago.
        if (pins[k].length)
            command(UNPIN, DMA + pins[k].offset, pins[k].length, 0);
        pins[k].offset = offset;
        pins[k].length = length;
        command(PIN, DMA + offset, length, 0);
    }
    if (pins[k].length && any() % 2) {
        u32 value = any();
        command(WRITE_PINNED, DMA + pins[k].offset, pins[k].length, value);
        expect(pins[k].offset, pins[k].length, value);
    }
    use(DMA + offset, offset, length);
}

// ---- with VT-d

#ifndef LINUX
#define VTD 0xfed90000u
#define SLOTS 64u
#define IOVAS 0x40000000u

static u32 slots[SLOTS]; // which page each has, or NONE
static u32 zero_entries;

static void vtd_write64(u32 at, u64 value)
{
    *word(VTD + at) = (u32)value;
    *word(VTD + at + 4) = (u32)(value >> 32);
}

static void set_entry(u32 addr, u64 value)
{
    *word(addr) = (u32)value;
    *word(addr + 4) = (u32)(value >> 32);
}

// The entries of a slot are 8 pages apart, so that no two mappings touch.
static u32 slot_iova(u32 slot) { return IOVAS + slot * 8 * PAGE; }
static u32 slot_entry(u32 slot) { return TABLES + 4 * PAGE + slot * 8 * 8; }

static void wait_invalidated(void)
{
    while (*word(VTD + 0xfc) >> 31)
        ;
}

static void invalidate_page(u32 iova)
{
    vtd_write64(0xf0, iova);
    vtd_write64(0xf8, 1ull << 63 | 3ull << 60 | 1ull << 32);
    wait_invalidated();
}

static void start_vtd(u32 bdf)
{
    for (u32 at = TABLES; at < TABLES + 5 * PAGE; at += 4)
        *word(at) = 0;
    set_entry(TABLES, (TABLES + PAGE) | 1);                             // root: bus 0
    set_entry(TABLES + PAGE + 16 * bdf, (TABLES + 2 * PAGE) | 1);       // context: the engine
    set_entry(TABLES + PAGE + 16 * bdf + 8, 1 << 8 | 1);                // domain 1, 39 bits
    set_entry(TABLES + 2 * PAGE + 8, (TABLES + 3 * PAGE) | 3);          // the second GiB
    set_entry(TABLES + 3 * PAGE, (TABLES + 4 * PAGE) | 3);              // its first 2 MiB
    vtd_write64(0x20, TABLES);
    *word(VTD + 0x18) = 1u << 30; // set root table
    while (!(*word(VTD + 0x1c) >> 30 & 1))
        ;
    vtd_write64(0x28, 1ull << 63 | 1ull << 61); // invalidate contexts
    while (*word(VTD + 0x2c) >> 31)
        ;
    vtd_write64(0xf8, 1ull << 63 | 1ull << 60); // invalidate all
    wait_invalidated();
    *word(VTD + 0x18) = 1u << 31; // on
    while (!(*word(VTD + 0x1c) >> 31))
        ;
    for (u32 slot = 0; slot < SLOTS; slot++)
        slots[slot] = NONE;
}

static void drive_viommu(u32 turn)
{
    u32 slot = turn % SLOTS, page = any() % PAGES, iova = slot_iova(slot);
    if (slots[slot] != NONE) {
        if (zero_entries) {
            set_entry(slot_entry(slot), 0);
        } else {
            *word(slot_entry(slot)) &= ~3u;
        }
        invalidate_page(iova); // unpins
    }
    set_entry(slot_entry(slot), (DMA + page * PAGE) | 3);
    invalidate_page(iova);
    slots[slot] = page;
    u32 at = any() % PAGE & ~3u, length = 4 + any() % (PAGE - at) / 4 * 4;
    if (any() % 4 == 0 && pins_allowed) {
        u32 value = any();
        command(PIN, iova + at, length, 0);
        command(WRITE_PINNED, iova + at, length, value);
        expect(page * PAGE + at, length, value);
    } else {
        use(iova + at, page * PAGE + at, length);
    }
}

#endif

// ---- rounds

static void check(void)
{
    for (u32 at = 0; at < PAGES * PAGE; at += 4)
        if (*word(DMA + at) != *word(SHADOW + at))
            fail("at, is, not", DMA + at, *word(DMA + at), *word(SHADOW + at));
}

static void stream(u32 what)
{
    set(IOVA, STREAM);
    set(IOVA + 4, 0);
    set(LENGTH, 4);
    set(COUNT, PLACES);
    set(STRIDE, PAGE);
    set(COMMAND, what);
    if (reg(STATUS) != 1)
        fail("stream", what, 0, 0);
}

// The stream has stopped: place p has the last number below SEQUENCE that goes there.
static void check_stream(void)
{
    u32 next = reg(SEQUENCE);
    for (u32 place = 0; place < PLACES && place < next; place++) {
        u32 last = (next - 1 - place) / PLACES * PLACES + place;
        if (*word(STREAM + place * PAGE) != last)
            fail("stream at, is, not", STREAM + place * PAGE, *word(STREAM + place * PAGE), last);
    }
}

static int has_word(const char *line, const char *name)
{
    for (; *line; line++) {
        u32 k = 0;
        while (name[k] && line[k] == name[k])
            k++;
        if (!name[k])
            return 1;
    }
    return 0;
}

static void work(const char *line)
{
    int streams = has_word(line, "stream"), cpu = has_word(line, "cpu");
    pins_allowed = !has_word(line, "nopin");
    background = has_word(line, "background");
    if (!has_memory())
        fail("no memory", 0, 0, 0);
    out8(0x3f9, 0); // no interrupts of the serial port
    out8(0x3fb, 3); // 8 bits
    u32 bdf = NONE;
    for (u32 at = 0; at < 256; at++)
        if (pci_read(at, 0) == 0x0d3a1234)
            bdf = at;
    if (bdf == NONE)
        fail("no engine", 0, 0, 0);
    pci_write(bdf, 4, pci_read(bdf, 4) | 6); // memory and bus master
    bar = pci_read(bdf, 0x10) & ~15u;
    if (!has_registers(bar))
        fail("no registers", bar, 0, 0);
    for (u32 at = 0; at < PAGES * PAGE; at += 4)
        *word(DMA + at) = *word(SHADOW + at) = 0;
    for (u32 at = 0; at < FILLED; at += 4)
        *word(FILLER + at) = any();
#ifndef LINUX
    int viommu = has_word(line, "viommu");
    zero_entries = has_word(line, "zero");
    if (viommu)
        start_vtd(bdf);
#endif
    print("guest: starts\n");
    for (u32 round = 0, turn = 0;; round++) {
        if (streams)
            stream(STREAM_ON);
        for (u32 k = 0; k < 256; k++, turn++) {
            if (reg(MAILBOX) == 1) {
                // The test wants nothing to happen for a while.
                set(MAILBOX, 2);
                while (reg(MAILBOX) == 2)
                    ;
            }
            if (cpu) {
                u32 offset = any() % (PAGES * PAGE) & ~3u;
                *word(DMA + offset) = *word(SHADOW + offset) = any();
                continue;
            }
#ifndef LINUX
            if (viommu) {
                drive_viommu(turn);
                continue;
            }
#endif
            drive(turn);
        }
        if (streams) {
            stream(STREAM_OFF);
            check_stream();
        }
        check();
        print("ok ");
        print_hex(round);
        print("\n");
    }
}

#ifdef LINUX
int main(int count, char **words)
{
    work(count > 1 ? words[1] : "");
}
#else
void kmain(struct multiboot *info)
{
    work(info->flags & 4 ? (const char *)info->cmdline : "");
}
#endif
