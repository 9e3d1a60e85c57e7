// SPDX-License-Identifier: GPL-2.0-only
/* Address spaces: locked memory that is charged to them, and copies from and to them. */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/capability.h>
#include <linux/kthread.h>
#include <linux/mm.h>
#include <linux/pagemap.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/uaccess.h>
#include "glue.h"

int dirty_grab(struct mm_struct **mm, struct task_struct **task)
{
	if (!current->mm)
		return -ENODEV;
	get_task_struct(current->group_leader);
	*task = current->group_leader;
	mmgrab(current->mm);
	*mm = current->mm;
	return 0;
}

void dirty_release(struct mm_struct *mm, struct task_struct *task)
{
	mmdrop(mm);
	put_task_struct(task);
}

struct mm_struct *dirty_current_mm(void)
{
	return current->mm;
}

bool dirty_mm_alive(struct mm_struct *mm)
{
	return atomic_read(&mm->mm_users) != 0;
}

bool dirty_lock_cap(void)
{
	return capable(CAP_IPC_LOCK);
}

int dirty_charge(struct mm_struct *mm, struct task_struct *task, u64 npages, bool lock_cap)
{
	int ret;

	if (!mmget_not_zero(mm))
		return -ESRCH;
	ret = mmap_write_lock_killable(mm);
	if (!ret) {
		ret = __account_locked_vm(mm, npages, true, task, lock_cap);
		mmap_write_unlock(mm);
	}
	mmput(mm);
	if (ret == -ENOMEM)
		pr_warn_ratelimited("Task %s (%d) RLIMIT_MEMLOCK (%ld) exceeded\n",
				    task->comm, task_pid_nr(task),
				    task_rlimit(task, RLIMIT_MEMLOCK));
	return ret;
}

void dirty_uncharge(struct mm_struct *mm, struct task_struct *task, u64 npages)
{
	/* An mm without users has no account any more. */
	if (!mmget_not_zero(mm))
		return;
	mmap_write_lock(mm);
	__account_locked_vm(mm, npages, false, task, true);
	mmap_write_unlock(mm);
	mmput(mm);
}

bool dirty_is_user_range(u64 addr, u64 len)
{
	return access_ok((void __user *)addr, len);
}

/*
 * Copies an ioctl's argument. C leaves the check of the kernel's side (hardened usercopy)
 * out where the size is a constant. Here it is one too, but of a Rust type, and the
 * slice has bounds: so the form without the check.
 */
size_t dirty_copy_from_user(void *to, u64 from, size_t len)
{
	return _copy_from_user(to, (void __user *)from, len);
}

/* Whether the caller may copy from and to mm. A kernel thread adopts it for that. */
static bool enter_mm(struct mm_struct *mm, bool *adopted)
{
	*adopted = false;
	if (!mmget_not_zero(mm))
		return false;
	if (!current->mm) {
		kthread_use_mm(mm);
		*adopted = true;
	}
	if (current->mm == mm)
		return true;
	mmput(mm);
	return false;
}

static void leave_mm_of(struct mm_struct *mm, bool adopted)
{
	if (adopted)
		kthread_unuse_mm(mm);
	mmput(mm);
}

/*
 * The two copies below are made under the container's lock. They wait for a page
 * that is not there only if `wait` is set; else they stop at it. Both return how
 * many bytes they left.
 */
size_t dirty_read_mm(struct mm_struct *mm, void *to, u64 from, size_t len, bool wait)
{
	const void __user *user = (const void __user *)from;
	bool adopted;

	if (!enter_mm(mm, &adopted))
		return len;
	if (wait) {
		len = copy_from_user(to, user, len);
	} else if (access_ok(user, len)) {
		pagefault_disable();
		len = __copy_from_user_inatomic(to, user, len);
		pagefault_enable();
	}
	leave_mm_of(mm, adopted);
	return len;
}

size_t dirty_write_mm(struct mm_struct *mm, u64 to, const void *from, size_t len, bool wait)
{
	void __user *user = (void __user *)to;
	bool adopted;

	if (!enter_mm(mm, &adopted))
		return len;
	if (wait) {
		len = copy_to_user(user, from, len);
	} else if (access_ok(user, len)) {
		pagefault_disable();
		len = __copy_to_user_inatomic(user, from, len);
		pagefault_enable();
	}
	leave_mm_of(mm, adopted);
	return len;
}

void dirty_hold_mm(struct mm_struct *mm)
{
	mmgrab(mm);
}

void dirty_drop_mm(struct mm_struct *mm)
{
	mmdrop(mm);
}

/*
 * Waits for the pages of an mm, which are not changed; returns how many bytes from
 * the first that cannot be had.
 */
size_t dirty_fault_in(struct mm_struct *mm, u64 addr, size_t len, bool write)
{
	const char __user *user = (const char __user *)addr;
	bool adopted;

	if (!access_ok(user, len) || !enter_mm(mm, &adopted))
		return len;
	len = write ? fault_in_safe_writeable(user, len) : fault_in_readable(user, len);
	leave_mm_of(mm, adopted);
	return len;
}
