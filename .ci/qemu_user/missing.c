// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * System calls that qemu-user does not have, for the tests that .ci/arch runs under it:
 * process_vm_readv and process_vm_writev of the own process; madvise's MADV_POPULATE_READ and
 * MADV_POPULATE_WRITE, which qemu-user answers with 0 and does not do; and mlock2.
 * Each byte is still reached by a system call, so that a bad address is an error.
 *
 * It is preloaded, and takes the place of libc's functions.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define PAGE 4096ul /* qemu-user's, for aarch64 */

/* Moves bytes of one page through a pipe: -1 and EFAULT if either end cannot be reached. */
static ssize_t move(const void *from, void *to, size_t len)
{
	int pipe[2];
	ssize_t moved = -1;

	if (pipe2(pipe, 0) != 0)
		return -1;
	if (write(pipe[1], from, len) == (ssize_t)len)
		moved = read(pipe[0], to, len);
	int error = errno;
	close(pipe[0]);
	close(pipe[1]);
	errno = error;
	return moved;
}

static ssize_t copy(const struct iovec *from, const struct iovec *to, const void *remote)
{
	size_t done = 0, len = to->iov_len;

	while (done < len) {
		size_t page = PAGE - ((uintptr_t)remote + done) % PAGE;
		size_t n = len - done < page ? len - done : page;

		if (move((char *)from->iov_base + done, (char *)to->iov_base + done, n) != (ssize_t)n) {
			if (done != 0)
				return done; /* as the kernel: up to the first bad page */
			errno = EFAULT;
			return -1;
		}
		done += n;
	}
	return done;
}

ssize_t process_vm_readv(pid_t pid, const struct iovec *local, unsigned long nlocal,
			 const struct iovec *remote, unsigned long nremote, unsigned long flags)
{
	if (pid != getpid() || nlocal != 1 || nremote != 1 || flags != 0) {
		errno = ENOSYS;
		return -1;
	}
	return copy(remote, local, remote->iov_base);
}

ssize_t process_vm_writev(pid_t pid, const struct iovec *local, unsigned long nlocal,
			  const struct iovec *remote, unsigned long nremote, unsigned long flags)
{
	if (pid != getpid() || nlocal != 1 || nremote != 1 || flags != 0) {
		errno = ENOSYS;
		return -1;
	}
	return copy(local, remote, remote->iov_base);
}

/* Reads a byte of a page, or ORs 0 into a word of it. */
static int touch(uintptr_t page, int write)
{
	uint32_t none = 0;
	char byte;

	if (!write)
		return move((void *)page, &byte, 1) == 1 ? 0 : -1;
	return syscall(SYS_futex, &none, FUTEX_WAKE_OP_PRIVATE, 0, 0, page,
		       FUTEX_OP(FUTEX_OP_OR, 0, FUTEX_OP_CMP_EQ, 1)) < 0 ? -1 : 0;
}

int madvise(void *start, size_t len, int advice)
{
	if (advice != MADV_POPULATE_READ && advice != MADV_POPULATE_WRITE)
		return syscall(SYS_madvise, start, len, advice);
	if ((uintptr_t)start % PAGE != 0) {
		errno = EINVAL;
		return -1;
	}
	for (size_t at = 0; at < len; at += PAGE) {
		if (touch((uintptr_t)start + at, advice == MADV_POPULATE_WRITE) != 0) {
			errno = EFAULT;
			return -1;
		}
	}
	return 0;
}

/* It makes the pages resident too, although MLOCK_ONFAULT says not to. */
int mlock2(const void *start, size_t len, unsigned int flags)
{
	if (flags & ~MLOCK_ONFAULT) {
		errno = EINVAL;
		return -1;
	}
	return mlock(start, len);
}
