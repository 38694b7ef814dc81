/* The first program of the Linux guest: sets the machine up, leaves a worker behind, becomes a shell.
 *
 * The worker fills and checks memory, writes and checks numbered blocks on /dev/vda, and echoes what it
 * gets on TCP port 7. A line sent there that reads "status" is answered with what it has seen:
 *     rounds=R errors=E block=B gap_us=G
 * From the kernel's command line: baton.ip=A.B.C.D (with a /24 mask). The shell reads the worker's
 * status from /tmp/status.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define WORDS (1024 * 1024) /* 8 MiB */
#define SLICE 8192          /* words touched in one turn */
#define BLOCK 4096
#define BLOCKS 256
#define CLIENTS 8

static uint64_t memory[WORDS];
static unsigned char block[BLOCK] __attribute__((aligned(BLOCK)));
static uint64_t rounds, errors, block_number, gap_us;

static uint64_t now_us(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static uint64_t pattern(uint64_t index, uint64_t round)
{
	uint64_t x = index * 0x9e3779b97f4a7c15ull + round;
	x ^= x >> 29;
	return x * 0xbf58476d1ce4e5b9ull;
}

static void set_address(const char *text)
{
	struct ifreq request;
	struct sockaddr_in *address = (struct sockaddr_in *)&request.ifr_addr;
	int s = socket(AF_INET, SOCK_DGRAM, 0);

	memset(&request, 0, sizeof request);
	strcpy(request.ifr_name, "lo");
	request.ifr_flags = IFF_UP | IFF_RUNNING;
	ioctl(s, SIOCSIFFLAGS, &request);

	memset(&request, 0, sizeof request);
	strcpy(request.ifr_name, "eth0");
	address->sin_family = AF_INET;
	inet_pton(AF_INET, text, &address->sin_addr);
	if (ioctl(s, SIOCSIFADDR, &request) < 0)
		perror("eth0 address");
	inet_pton(AF_INET, "255.255.255.0", &address->sin_addr);
	ioctl(s, SIOCSIFNETMASK, &request);
	request.ifr_flags = IFF_UP | IFF_RUNNING;
	if (ioctl(s, SIOCSIFFLAGS, &request) < 0)
		perror("eth0 up");
	close(s);
}

/* One slice of memory: what the last round left must be there; then this round's pattern. */
static void memory_turn(void)
{
	static uint64_t at, round = 1;

	for (uint64_t i = at; i < at + SLICE; i++) {
		if (round > 1 && memory[i] != pattern(i, round - 1))
			errors++;
		memory[i] = pattern(i, round);
	}
	at += SLICE;
	if (at == WORDS) {
		at = 0;
		round++;
		rounds++;
	}
}

/* Writes the next numbered block, flushes it, and reads an earlier one back. */
static void disk_turn(int disk)
{
	uint64_t *words = (uint64_t *)block;
	uint64_t number = block_number + 1;

	for (unsigned i = 0; i < BLOCK / 8; i++)
		words[i] = pattern(i, number);
	words[0] = number;
	if (pwrite(disk, block, BLOCK, (off_t)(number % BLOCKS) * BLOCK) != BLOCK || fsync(disk) != 0) {
		errors++;
		return;
	}
	block_number = number;
	number = number > 100 ? number - 100 : 1;
	if (pread(disk, block, BLOCK, (off_t)(number % BLOCKS) * BLOCK) != BLOCK || words[0] != number ||
	    words[5] != pattern(5, number))
		errors++;
}

static int status(char *text, size_t size)
{
	return snprintf(text, size, "rounds=%llu errors=%llu block=%llu gap_us=%llu\n", (unsigned long long)rounds,
			(unsigned long long)errors, (unsigned long long)block_number, (unsigned long long)gap_us);
}

static void serve(struct pollfd *client)
{
	char text[1024];
	ssize_t count = read(client->fd, text, sizeof text);

	if (count <= 0) {
		close(client->fd);
		client->fd = -1;
		return;
	}
	if (count >= 6 && !memcmp(text, "status", 6))
		count = status(text, sizeof text);
	if (write(client->fd, text, count) != count) {
		close(client->fd);
		client->fd = -1;
	}
}

static void work(void)
{
	struct pollfd fds[1 + CLIENTS];
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(7)};
	int one = 1, disk = open("/dev/vda", O_RDWR | O_DIRECT | O_CLOEXEC);
	uint64_t last, reported = 0;

	signal(SIGPIPE, SIG_IGN);
	fds[0].fd = socket(AF_INET, SOCK_STREAM, 0);
	setsockopt(fds[0].fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(fds[0].fd, (struct sockaddr *)&address, sizeof address) < 0 || listen(fds[0].fd, CLIENTS) < 0)
		fds[0].fd = -1;
	fds[0].events = POLLIN;
	for (int i = 1; i <= CLIENTS; i++) {
		fds[i].fd = -1;
		fds[i].events = POLLIN;
	}
	last = now_us();
	for (;;) {
		uint64_t now;

		/* A pause of 5 ms keeps the (slow) processor free for the shell and the network. */
		poll(fds, 1 + CLIENTS, 5);
		for (int i = 1; i <= CLIENTS; i++)
			if (fds[i].fd >= 0 && fds[i].revents)
				serve(&fds[i]);
		if (fds[0].fd >= 0 && fds[0].revents & POLLIN) {
			int client = accept(fds[0].fd, NULL, NULL), slot = 1;

			while (slot <= CLIENTS && fds[slot].fd >= 0)
				slot++;
			if (slot <= CLIENTS)
				fds[slot].fd = client;
			else
				close(client);
		}
		memory_turn();
		if (disk >= 0)
			disk_turn(disk);
		now = now_us();
		if (now - last > gap_us)
			gap_us = now - last;
		last = now;
		if (now - reported > 1000000) {
			char text[128];
			int file = open("/tmp/status", O_CREAT | O_TRUNC | O_WRONLY, 0644);
			int count = status(text, sizeof text);

			if (file >= 0 && write(file, text, count) == count)
				reported = now;
			if (file >= 0)
				close(file);
		}
	}
}

int main(void)
{
	char line[2048] = "", *ip;
	int file;

	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	mount("proc", "/proc", "proc", 0, NULL);
	file = open("/proc/cmdline", O_RDONLY);
	if (file >= 0) {
		if (read(file, line, sizeof line - 1) < 0)
			line[0] = 0;
		close(file);
	}
	file = open("/dev/console", O_RDWR);
	if (file >= 0) {
		dup2(file, 0);
		dup2(file, 1);
		dup2(file, 2);
		if (file > 2)
			close(file);
	}
	ip = strstr(line, "baton.ip=");
	if (ip) {
		ip += strlen("baton.ip=");
		ip[strcspn(ip, " \n")] = 0;
		set_address(ip);
	}
	if (fork() == 0) {
		close(0);
		work();
	}
	setsid();
	ioctl(0, TIOCSCTTY, 1);
	setenv("PATH", "/bin", 1);
	setenv("PS1", "guest# ", 1);
	setenv("HOME", "/tmp", 1);
	printf("baton guest ready\n");
	fflush(stdout);
	execl("/bin/sh", "sh", "-i", (char *)NULL);
	perror("sh");
	pause();
	return 1;
}
